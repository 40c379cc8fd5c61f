"""Transforms. Properties: shape and bytes, draws from the seed alone, each option changes the image it should;
evaluation is what it is by definition, of strips too."""

import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode, v2

from data.config import AugmentConfig
from data.stream import Draw
from data.transforms import EvalTransform, TrainTransform
from utils import rng

PLAIN = {
    "image_size_hw": [32, 48], "crop_scale": [1.0, 1.0], "crop_ratio": [1.5, 1.5], "horizontal_flip": 0.0,
    "affine": None, "rand_augment": None, "random_erasing": 0.0, "fill": 200, "interpolation": "bilinear",
    "eval_crop": 1.0, "mean": [0.5], "std": [0.5],
}  # fmt: skip
OPTIONS = {
    "affine": {"affine": {"degrees": 30.0, "translate": 0.2, "scale": [0.5, 0.6], "shear_degrees": 10.0}},
    "rand_augment": {"rand_augment": {"num_ops": 3, "magnitude": 20}},
    "random_erasing": {"random_erasing": 1.0},
    "horizontal_flip": {"horizontal_flip": 1.0},
}


def apply(changes, key=0, channels=3):
    transform = TrainTransform(AugmentConfig(**{**PLAIN, **changes}))
    image = torch.randint(0, 256, (channels, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with rng.seeded(key):
        return image, transform(image, Draw(0, 0, key))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_option_changes_the_image_by_the_draw_alone(option, channels):
    results = [apply(OPTIONS[option], key, channels)[1] for key in (5, 5, 6)]
    image, unchanged = apply({}, channels=channels)
    assert torch.equal(image, unchanged)
    assert all(result.shape == (channels, 32, 48) and result.dtype == torch.uint8 for result in results)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], image)
    assert torch.equal(results[0], results[2]) == (option == "horizontal_flip")


def test_erasing_leaves_the_rest_and_fills_with_noise():
    image, erased = apply(OPTIONS["random_erasing"])
    changed = (image != erased).any(dim=0)
    assert 0.02 < changed.float().mean() < 0.35
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert changed.sum() > 0.9 * area  # a rectangle
    assert erased[:, changed].float().std() > 50


def test_what_affine_uncovers_has_the_fill_level():
    _, moved = apply(OPTIONS["affine"])
    assert (moved[:, 0, 0] == 200).all() and (moved[:, -1, -1] == 200).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rand_augment": {"num_ops": 0, "magnitude": 9}}, "rand_augment.num_ops"),
        ({"rand_augment": {"num_ops": 2, "magnitude": 31}}, "rand_augment.magnitude"),
        ({"affine": {**OPTIONS["affine"]["affine"], "scale": [1.2, 0.8]}}, "augment.affine.scale: 1.2 to 0.8"),
        ({"random_erasing": 1.5}, "random_erasing"),
        ({"fill": 256}, "fill"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValidationError) as caught:
        AugmentConfig(**{**PLAIN, **change})
    found = ".".join(str(part) for part in caught.value.errors()[0]["loc"]) + caught.value.errors()[0]["msg"]
    assert message in found


def by_definition(image, size_hw, eval_crop, interpolation):
    """The whole image to image size / eval_crop by its shorter side, then the centre."""
    wanted = [round(side / eval_crop) for side in size_hw]
    factor = max(target / side for target, side in zip(wanted, image.shape[-2:]))
    resized_hw = [max(least, round(side * factor)) for least, side in zip(size_hw, image.shape[-2:])]
    mode = InterpolationMode(interpolation)
    return v2.functional.center_crop(v2.functional.resize(image, resized_hw, mode, antialias=True), list(size_hw))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_hw", [(300, 100), (37, 111), (24, 160), (2000, 250), (5, 5)])
def test_evaluation_of_ordinary_images_is_of_the_whole(image_hw, interpolation):
    """Up to a resized side of eight times 32 or 27."""
    image = torch.randint(0, 256, (3, *image_hw), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = EvalTransform((28, 24), 0.875, interpolation)(image)
    assert torch.equal(found, by_definition(image, (28, 24), 0.875, interpolation))


@pytest.mark.parametrize(("image_hw", "axis"), [((8, 401), -1), ((402, 8), -2), ((100, 2999), -1)])
def test_evaluation_of_a_strip_sees_the_same_centre(image_hw, axis):
    ramp = torch.linspace(0, 255 * 20, image_hw[axis]).sin().mul(100).add(128).round().to(torch.uint8)
    image = ramp.view(-1, 1) if axis == -2 else ramp.view(1, -1)
    image = image.expand(3, *image_hw).contiguous()
    found = EvalTransform((28, 24), 0.875, "bilinear")(image)
    whole = by_definition(image, (28, 24), 0.875, "bilinear")
    assert (found.int() - whole.int()).abs().float().mean() < 2


@pytest.mark.parametrize("image_hw", [(1, 50_000), (50_000, 1), (3, 40_001), (100, 100_000)])
def test_a_strip_is_not_blown_up_before_its_centre_is_cut(image_hw, monkeypatch):
    resize, made = v2.functional.resize, []

    def noted(image, size, **options):
        made.append((tuple(image.shape[-2:]), tuple(size)))
        return resize(image, size, **options)

    monkeypatch.setattr(v2.functional, "resize", noted)
    result = EvalTransform((224, 224), 0.875, "bicubic")(torch.full((3, *image_hw), 77, dtype=torch.uint8))
    assert result.shape == (3, 224, 224) and (result == 77).all()
    (((height, width), resized),) = made
    assert min(resized) == 256 and max(resized) <= 9 * 256
    assert min(height, width) == min(image_hw) and max(height, width) <= 9 * min(image_hw)
