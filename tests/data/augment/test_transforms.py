"""Transforms. Properties: shape and bytes, draws from the seed alone, each option changes the image it should;
evaluation is what it is by definition, of strips too."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode, v2

from data.augment import transforms
from data.augment.config import AugmentConfig
from data.augment.steps import describe_augmentation, evaluation_views, training_views
from data.augment.transforms import PolicyAugment
from data.images.prepare import letterbox
from data.stream.order import Draw
from tests.support import no_large_allocation
from utils import rng
from utils.formats.preprocessing import Preprocessing

PLAIN = {
    "image_size_hw": [32, 48], "pad": "none", "crop_scale": [1.0, 1.0], "crop_ratio": [1.5, 1.5],
    "horizontal_flip": 0.0,
    "affine": None, "color_jitter": None, "rand_augment": None, "random_erasing": 0.0,
    "fill": 200, "on_device": False, "shrink": False, "interpolation": "bilinear", "eval_resize": "crop",
    "eval_crop": 1.0, "mean": [0.5], "std": [0.5],
}  # fmt: skip
OPTIONS = {
    "affine": {"affine": {"degrees": 30.0, "translate": 0.2, "scale": [0.5, 0.6], "shear_degrees": 10.0}},
    "rand_augment": {"rand_augment": "rand-m9-n3-p1-mstd0.5-inc1", "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3},
    "random_erasing": {"random_erasing": 1.0},
    "color_jitter": {"color_jitter": {"strength": 0.5, "hue": 0.2}},
    "horizontal_flip": {"horizontal_flip": 1.0},
}


def apply(changes, key=0, channels=3):
    """Return an image, and the image that training makes of it, in a worker and on the device."""
    values = {**PLAIN, **changes}
    values |= {name: values[name][:channels] for name in ("mean", "std")}
    views = training_views(AugmentConfig(**values))
    image = torch.randint(0, 256, (channels, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with rng.seeded(key):
        batch = {"key": torch.tensor([key]), "images": views["images"](image, Draw(0, 0, key))[None]}
    if "augment" in views:
        batch = views["augment"].on_device(batch | {"augment": views["augment"].draw([0], [key])})
    return image, batch["images"][0]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_option_changes_the_image_by_the_draw_alone(option, channels, on_device):
    """No step is skipped: the worker makes those that the device cannot."""
    changes = {**OPTIONS[option], "on_device": on_device}
    results = [apply(changes, key, channels)[1] for key in (5, 5, 6)]
    image, unchanged = apply({"on_device": on_device}, channels=channels)
    assert torch.equal(image, unchanged)
    assert all(result.shape == (channels, 32, 48) and result.dtype == torch.uint8 for result in results)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], image)
    assert torch.equal(results[0], results[2]) == (option == "horizontal_flip")


def test_the_first_screen_names_the_steps_that_are_on():
    values = {**PLAIN, "crop_scale": [0.25, 1.0], "random_erasing": 0.5, "on_device": True}
    assert describe_augmentation(AugmentConfig(**values), task_mirrors=False) == (
        "32 x 48 px, pad=none; crops of 25% to 100%, erasing"
    )
    assert "mirror" in describe_augmentation(AugmentConfig(**values), task_mirrors=True)


@pytest.mark.parametrize(
    "change, key",
    [
        ({"rand_augment": "rand-m9-msdt0.5"}, "rand_augment"),
        ({"affine": {**OPTIONS["affine"]["affine"], "scale": [1.2, 0.8]}}, "affine.scale"),
    ],
)
def test_values_out_of_range_are_refused(change, key):
    with pytest.raises(ValidationError) as caught:
        AugmentConfig(**{**PLAIN, **change})
    assert key in ".".join(map(str, caught.value.errors()[0]["loc"])) + caught.value.errors()[0]["msg"]


def evaluate(image, size_hw, eval_crop=0.875, interpolation="bilinear", eval_resize="crop"):
    stated = {"image_size_hw": list(size_hw), "eval_crop": eval_crop, "interpolation": interpolation}
    stated |= {"channels": 1, "mean": [0.5], "std": [0.5], "eval_resize": eval_resize}
    return evaluation_views(stated)["images"](image)


@pytest.mark.parametrize("image_hw", [(1, 50_000), (100_000, 100)])
def test_a_strip_is_not_blown_up_before_its_centre_is_cut(image_hw):
    image = torch.full((3, *image_hw), 77, dtype=torch.uint8)
    with no_large_allocation():
        result = evaluate(image, (224, 224), 0.875, "bicubic")
    assert result.shape == (3, 224, 224) and (result == 77).all()


# --- the published augmentation: timm's own functions, and draws that depend on the sample's key alone

PUBLISHED = {**PLAIN, "image_size_hw": [32, 32], "crop_ratio": [1.0, 1.0], "interpolation": "bicubic",
             "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip


def test_no_bit_left_is_black():
    """timm's posterize keeps 0 bits at magnitude 10, which `rand-m9-mstd0.5` draws in 2 % of the cases."""
    values = AugmentConfig(**{**PUBLISHED, "rand_augment": "rand-m10-n15-p1-inc1"})
    image = Image.fromarray(np.full((32, 32, 3), 77, dtype=np.uint8))
    policy = PolicyAugment(values)._policy
    (operation,) = [op for op in policy.ops if op.aug_fn is transforms._posterize]
    assert np.asarray(operation(image)).max() == 0
    operation.magnitude = 5
    assert set(np.unique(operation(image))) == {64}


def test_squash_resizes_both_sides_and_crops_nothing():
    ramp = torch.arange(96, dtype=torch.uint8).view(1, 1, 96).expand(3, 40, 96).contiguous()
    squashed = evaluate(ramp, (32, 32), eval_resize="squash")
    wanted = v2.functional.resize(ramp, [32, 32], interpolation=InterpolationMode.BILINEAR, antialias=True)
    assert torch.equal(squashed, wanted)
    cropped = evaluate(ramp, (32, 32))
    assert squashed.min() < 3 < 20 < cropped.min()


@pytest.mark.parametrize("image_hw", [(90, 150), (151, 89), (64, 64), (333, 500), (40, 41), (9, 901), (1802, 24)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(image_hw):
    """As published: Resize(256) and CenterCrop(224), in small. Of a strip, the same centre to a pixel."""
    noise = torch.randint(0, 256, (3, *image_hw), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = soft(3, image_hw) if max(image_hw) > 900 else noise
    published = v2.Compose([v2.Resize(64, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(56)])
    distance = (evaluate(image, (56, 56), 0.875, "bicubic").int() - published(image).int()).abs()
    assert distance.float().mean() < 2 if max(image_hw) > 900 else not distance.any()


# --- padding to a square, and the filters of the resize


def by_pillow(image, size, interpolation, colour):
    """The picture in the middle of a square, resized: Pillow's own, an odd pixel to the right or the bottom."""
    picture = v2.functional.to_pil_image(image)
    side = max(picture.size)
    square = Image.new(picture.mode, (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    filters = getattr(Image.Resampling, interpolation.upper())
    return v2.functional.pil_to_tensor(square.resize((size, size), filters))


def soft(channels, image_hw):
    coarse = torch.rand(1, channels, 7, 9, generator=torch.Generator().manual_seed(2)) * 255
    fine = torch.nn.functional.interpolate(coarse, image_hw, mode="bicubic").clamp(0, 255)
    return fine[0].round().to(torch.uint8)


PADDED = {"image_size_hw": [32, 32], "pad": "square", "crop_ratio": [1.0, 1.0], "mean": [0.5] * 3, "std": [0.5] * 3}
BACKGROUNDS = [("white", 3, (255,) * 3), ("drop", 3, (255,) * 3), ([250, 0, 40], 3, (250, 0, 40)), ("black", 1, 0)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("background, channels, colour", BACKGROUNDS)
@pytest.mark.parametrize("image_hw", [(90, 51), (20, 9)])
def test_training_and_evaluation_pad_as_pillow_does(image_hw, background, channels, colour, interpolation):
    values = {**PLAIN, **PADDED, "interpolation": interpolation, "mean": [0.5] * channels, "std": [0.5] * channels}
    config, image = AugmentConfig(**values), soft(channels, image_hw)
    wanted = by_pillow(image, 32, interpolation, colour).int()
    evaluation = evaluation_views({**config.preprocessing(channels), "background": background})["images"](image)
    assert (evaluation.int() - wanted).abs().max() <= 1
    for on_device in (False, True):
        view = training_views(config.model_copy(update={"on_device": on_device}), background)["images"]
        assert torch.equal(view(image, Draw(0, 0, 0)), evaluation)


@pytest.mark.parametrize("image_hw", [(1, 50_000), (9_000, 700)])
def test_a_strip_is_shrunk_before_it_is_padded(image_hw):
    image = np.zeros((*image_hw, 3), np.uint8)
    square = letterbox(image, Preprocessing(**AugmentConfig(**PLAIN | PADDED).preprocessing(3)))
    assert square.shape == (256, 256, 3)
    assert (square == 0).mean() == pytest.approx(max(min(image_hw) / max(image_hw), 1 / 256), rel=0.03)
