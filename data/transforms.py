"""Transforms from a decoded image to the uint8 tensor of a batch; random draws come from the sample's key.

The transforms are torchvision's v2; they draw from torch's global generator, which the reader seeds with the key.
Each runs on what it is fastest with, by a factor of 2 to 4 (one thread, 64 and 224 px): crops and resizes on tensors,
affine maps and RandAugment on Pillow's images.
Normalisation happens on the device (models/normalise.py): a batch carries bytes, a quarter of floats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from data.config import AugmentConfig
from data.stream import Draw

# Only the middle of a very long image is resized, at most this many times the evaluation size: a strip of 1 x 50,000
# pixels would become one of 256 x 12,800,000.
_LONGEST = 8


class Transform(Protocol):
    """From uint8 [C, H, W] of any size to uint8 [C, h, w] of the size that the draw's group has."""

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the transformed image."""
        ...


class NoiseErasing(v2.RandomErasing):
    """Erase a rectangle of 2 to 33 % of the image with noise, for which torchvision's own takes floats only."""

    def __init__(self, p: float) -> None:
        super().__init__(p=p, value=0)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Return the image with noise in the drawn rectangle, or as it was where none was drawn."""
        if params["v"] is not None:
            params = {**params, "v": torch.randint(0, 256, (inpt.shape[-3], params["h"], params["w"])).to(inpt)}
        return super().transform(inpt, params)


def on_pillow(transform: v2.Transform) -> list[torch.nn.Module]:
    """Return the steps that apply a transform to the image as Pillow has it; from and to uint8 [C, H, W], C 1 or 3."""
    return [v2.ToPILImage(), transform, v2.PILToTensor()]


class TrainTransform:
    """Affine map, random resized crop, mirror, RandAugment and erasing, as `augment` says.

    Source: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719); random erasing, Zhong et al. 2017 (arXiv 1708.04896).
    """

    def __init__(self, config: AugmentConfig) -> None:
        steps: list[torch.nn.Module] = []
        if config.affine is not None:
            # Before the resize: after it, training images would be blurred and validation images not.
            affine = config.affine
            move = v2.RandomAffine(
                affine.degrees,
                translate=(affine.translate, affine.translate),
                scale=tuple(affine.scale),
                shear=[-affine.shear_degrees, affine.shear_degrees] * 2,
                interpolation=InterpolationMode.BILINEAR,
                fill=config.fill,
            )
            steps += on_pillow(move)
        steps.append(
            v2.RandomResizedCrop(
                tuple(config.image_size_hw),
                scale=tuple(config.crop_scale),
                ratio=tuple(config.crop_ratio),
                interpolation=InterpolationMode(config.interpolation),
                antialias=True,
            )
        )
        if config.horizontal_flip > 0:
            steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
        if config.rand_augment is not None:
            operations, magnitude = config.rand_augment.num_ops, config.rand_augment.magnitude
            steps += on_pillow(v2.RandAugment(operations, magnitude, fill=config.fill))
        if config.random_erasing > 0:
            # Before normalisation, so with uniformly distributed bytes.
            steps.append(NoiseErasing(config.random_erasing))
        self._steps = v2.Compose(steps)

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the augmented image."""
        return self._steps(image)


class EvalTransform:
    """The shorter side to image size / eval_crop, then the centre."""

    def __init__(self, image_size_hw: Sequence[int], eval_crop: float, interpolation: str) -> None:
        height, width = image_size_hw
        self._size_hw = (height, width)
        self._resized_hw = (round(height / eval_crop), round(width / eval_crop))
        self._interpolation = InterpolationMode(interpolation)

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> Self:
        """Return the transform that a weight file's preprocessing states (AugmentConfig.preprocessing)."""
        return cls(preprocessing["image_size_hw"], preprocessing["eval_crop"], preprocessing["interpolation"])

    def __call__(self, image: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the resized centre."""
        height, width = image.shape[-2:]
        factor = max(self._resized_hw[0] / height, self._resized_hw[1] / width)
        image = _cut_middle(image, [math.ceil(_LONGEST * side / factor) for side in self._resized_hw])
        height, width = image.shape[-2:]
        size = [max(self._size_hw[0], round(height * factor)), max(self._size_hw[1], round(width * factor))]
        image = v2.functional.resize(image, size, interpolation=self._interpolation, antialias=True)
        return v2.functional.center_crop(image, list(self._size_hw))


def _cut_middle(image: Tensor, most_hw: Sequence[int]) -> Tensor:
    """Cut sides longer than `most_hw` to their middle; one pixel more where the centre would move by half a pixel."""
    for axis, most in zip((-2, -1), most_hw):
        side = image.shape[axis]
        kept = most + (side - most) % 2
        if side > kept:
            image = image.narrow(axis, (side - kept) // 2, kept)
    return image
