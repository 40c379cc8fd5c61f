"""Augmentation on the device. Reference equality: torchvision's functions, one image at a time with the same draws.
Properties: splits and workers change nothing, the draws cover their ranges. That nothing waits for the device:
engine/test_fake_cuda.py."""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from data.augment import on_device
from data.augment.config import AugmentConfig
from data.augment.on_device import DeviceAffine, DeviceColours, DeviceErasing, DeviceMirror, inverse_matrix, noise_of
from data.augment.steps import DeviceAugment
from tests.in_process import SHORT, SMALL_MODEL, make_images, run
from tests.support import read_conf
from utils import rng
from utils.cut import cut_images

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZE = [24, 32]
NO_COLOURS = (1.0, 1.0, 1.0, 0.0)
OPTIONS = {
    "mirror": {"horizontal_flip": 0.5},
    "affine": {"affine": {"degrees": 40.0, "translate": 0.2, "scale": [0.6, 1.3], "shear_degrees": 15.0}},
    "colours": {"color_jitter": {"strength": 0.5, "hue": 0.3}},
    "erasing": {"random_erasing": 0.7},
}
ALL = {key: value for option in OPTIONS.values() for key, value in option.items()}
CASES = {
    **OPTIONS,
    "all": ALL,
    "no hue": {"color_jitter": {"strength": 0.6, "hue": 0.0}},
    "hue alone": {"color_jitter": {"strength": 0.0, "hue": 0.5}},
}


def config_of(channels=3, **changes):
    values = read_conf("augment/light")
    values |= {"image_size_hw": SIZE, "horizontal_flip": 0.0, "on_device": True, "fill": 200}
    values |= {"mean": [0.5, 0.4, 0.6][:channels], "std": [0.2, 0.3, 0.25][:channels]}
    return AugmentConfig.model_validate(values | changes)


def draw(augment):
    """Return the parameters of a sample, and what each step has drawn; for the affine map, torchvision's arguments."""
    with mock.patch.object(on_device, "inverse_matrix", wraps=inverse_matrix) as matrix:
        drawn = [step.draw() for step in augment.steps]
    named = {type(step): own for step, own in zip(augment.steps, drawn)}
    if matrix.called:
        named[DeviceAffine] = matrix.call_args.args[1:]
    return torch.tensor([number for own in drawn for number in own]), named


def draw_batch(config, count, channels=3):
    """Return the hook's object, images of soft noise, the draws of each sample, their parameters and keys."""
    augment, generator = DeviceAugment(config), torch.Generator().manual_seed(3)
    coarse = torch.rand(count, channels, SIZE[0] // 4, SIZE[1] // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1)
    images = (images * 255).round().to(torch.uint8)
    keys, drawn = torch.tensor([rng.sample_key(0, place) for place in range(count)]), []
    for key in keys.tolist():
        with rng.seeded(key):
            drawn.append(draw(augment))
    return augment, images, [own for _, own in drawn], torch.stack([numbers for numbers, _ in drawn]), keys


def reference(image, drawn, config, noise):
    """Apply torchvision's functions to one image, in float32 from 0 to 1, and round at the end as the batch does."""
    image = image.float() / 255
    if config.affine is not None:
        # A frame in the fill's level keeps torchvision from applying the fill's share twice along the image's edge.
        frame = 3 * max(SIZE)
        image = tv.pad(image, [frame], fill=config.fill / 255)
        angle, translate, scale, shear = drawn[DeviceAffine]
        image = tv.affine(
            image, angle=angle, translate=list(translate), scale=scale, shear=list(shear),
            interpolation=InterpolationMode.BILINEAR, fill=[config.fill / 255],
        )  # fmt: skip
        image = tv.crop(image, frame, frame, *SIZE)
    if drawn.get(DeviceMirror) == [1.0]:
        image = tv.horizontal_flip(image)
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for change, factor, unchanged in zip(changes, drawn.get(DeviceColours, ()), NO_COLOURS):
        image = image if factor == unchanged else change(image, factor)
    image = (image * 255).round().to(torch.uint8)
    top, left, height, width = map(int, drawn.get(DeviceErasing, [0] * 4))
    if height:
        image = tv.erase(image, top, left, height, width, noise[:, top : top + height, left : left + width])
    return image


# ------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_equals_torchvisions_functions_on_each_image(case, channels):
    """To one level in a few pixels: both round once, after float32 sums in another order and on another scale."""
    config = config_of(channels, **CASES[case])
    augment, images, drawn, parameters, keys = draw_batch(config, 48, channels)
    found = augment.apply(images, parameters, keys)
    noise = noise_of(keys, images.shape)
    wanted = torch.stack([reference(*sample, config, own) for *sample, own in zip(images, drawn, noise)])
    assert found.dtype == torch.uint8 and found.is_contiguous()
    distance = (found.int() - wanted.int()).abs()
    assert distance.max() <= 1 and (distance > 0).float().mean() < 5e-4
    assert channels == 1 and case == "hue alone" or not torch.equal(found, images)


def test_the_edge_of_the_fills_level_stays_invisible():
    """A white letter's sheet, turned: no grey line where the sheet ended."""
    config = config_of(1, **OPTIONS["affine"], fill=255)
    augment, _, _, parameters, keys = draw_batch(config, 16, 1)
    assert (augment.apply(torch.full((16, 1, *SIZE), 255, dtype=torch.uint8), parameters, keys) == 255).all()


def test_no_change_is_no_change_to_the_byte():
    augment, images, _, _, keys = draw_batch(config_of(**ALL), 8)
    identity = inverse_matrix(SIZE, 0.0, (0, 0), 1.0, (0.0, 0.0))
    for mirrored, expected in ((0.0, images), (1.0, images.flip(-1))):
        parameters = torch.tensor([*identity, mirrored, *NO_COLOURS, 0, 0, 0, 0]).repeat(8, 1)
        assert torch.equal(augment.apply(images, parameters, keys), expected)


# -------------------------------------------------------------------------------------------------- splits and workers


def test_the_split_of_a_batch_changes_no_bit():
    augment, images, _, parameters, keys = draw_batch(config_of(**ALL), 13)
    whole = augment.apply(images, parameters, keys)
    for sizes in ([1] * 13, [5, 8], [2, 7, 4]):
        pieces = [part.split(sizes) for part in (images, parameters, keys)]
        assert torch.equal(torch.cat([augment.apply(*piece) for piece in zip(*pieces)]), whole)


def test_a_batch_of_large_images_is_cut_in_parts(monkeypatch):
    content = torch.randint(0, 256, (2 * 30 * 40 * 3,), dtype=torch.uint8)
    windows = torch.tensor([[number * 30, 120, 20, 20 + number, number % 2] for number in range(5)])
    cut = functools.partial(cut_images, content, windows, [30, 40, 3], SIZE, "bicubic")
    whole = cut()
    monkeypatch.setattr("utils.cut._PART_BYTES", 2 * 30 * 40 * 3)
    assert torch.equal(cut(), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the tests above do the same on a CPU")
def test_a_gpu_gives_the_same_images():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    augment, *batch = draw_batch(config_of(**ALL), 32)
    images, _, parameters, keys = batch
    here = augment.apply(images, parameters, keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [
            part.cuda(non_blocking=True) for part in (images.pin_memory(), parameters.pin_memory(), keys.pin_memory())
        ]
        there = augment.apply(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    distance = (there.cpu().int() - here.int()).abs()
    assert distance.max() <= 1 and (distance > 0).float().mean() < 1e-2


# ----------------------------------------------------------------------------------------------------------- the draws


RANGES = {
    "angle": (lambda drawn: drawn[DeviceAffine][0], -40.0, 40.0),
    "scale": (lambda drawn: drawn[DeviceAffine][2], 0.6, 1.3),
    "shear": (lambda drawn: drawn[DeviceAffine][3][1], -15.0, 15.0),
    "shift": (lambda drawn: drawn[DeviceAffine][1][0], -0.2 * SIZE[1], 0.2 * SIZE[1]),
    "brightness": (lambda drawn: drawn[DeviceColours][0], 0.5, 1.5),
    "hue": (lambda drawn: drawn[DeviceColours][3], -0.3, 0.3),
    "mirror": (lambda drawn: drawn[DeviceMirror][0], 0, 1),
    "erasing": (lambda drawn: drawn[DeviceErasing][2] > 0, 0, 1),
}


def test_the_draws_cover_their_ranges():
    """4,000 draws: ends within 5 % of a range, or a pixel of the shift; means within four standard errors."""
    augment = DeviceAugment(config_of(**ALL | {"horizontal_flip": 0.5, "random_erasing": 0.5}))
    drawn = []
    for position in range(4000):
        with rng.seeded(rng.sample_key(0, position)):
            drawn.append(draw(augment)[1])
    for name, (read, low, high) in RANGES.items():
        values = np.array([read(one) for one in drawn], float)
        assert [values.min(), values.max()] == pytest.approx([low, high], abs=0.08 * (high - low)), name
        assert abs(values.mean() - (low + high) / 2) < 4 * values.std() / 4000**0.5, name
    erased = [one[DeviceErasing] for one in drawn]
    areas = [height * width / (SIZE[0] * SIZE[1]) for _, _, height, width in erased if height]
    assert 0.01 < min(areas) < 0.04 and 0.28 < max(areas) < 0.36


# --------------------------------------------------------------------------------------------------------------- kinds


def test_a_classifier_trains_with_it_and_fits_its_head_to_augmented_images(tmp_path, monkeypatch):
    images, applied = make_images(tmp_path / "images"), []
    apply = DeviceAugment.apply
    monkeypatch.setattr(
        DeviceAugment, "apply", lambda self, *batch: applied.append(len(batch[0])) or apply(self, *batch)
    )
    words = [*SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={images}", "augment=light", "task.head=fitted"]
    words += ["augment.on_device=true", "run_dir=run"]
    run("finetune", words, tmp_path)
    assert sum(applied[:-4]) >= 8 and applied[-4:] == [2, 2, 2, 2]  # the head's images, then two steps of two batches
