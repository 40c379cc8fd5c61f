"""Transforms. Properties: shape and bytes, draws from the seed alone, each option changes the image it should."""

import pytest
import torch
from pydantic import ValidationError

from data.config import AugmentConfig
from data.stream import Draw
from data.transforms import TrainTransform
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
