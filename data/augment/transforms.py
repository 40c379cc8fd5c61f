"""Transforms of one image in a worker, with random numbers from the sample's key; data/augment/steps.py lists them.

The transforms are torchvision's v2; they draw from torch's global generator, which the reader seeds with the key.
Crops and resizes run on tensors and affine maps on Pillow images, which is 2 to 4 times as fast as the reverse (one
thread, 64 and 224 px). RandAugment is timm's, on Pillow images.
Normalisation happens on the device (models/image_model.py), so batches hold bytes, a quarter of the size of floats.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from data.augment.config import AugmentConfig
from data.images.resize import on_pixels, resize
from utils import rng
from utils.io.files import Json

_TRIES = 4  # crops of a random shape, before torchvision's


class NoiseErasing(v2.RandomErasing):
    """Replace a rectangle of 2 to 33 % of the image by uniform bytes; torchvision's noise is for floats only.

    Differs: published code draws normal noise after normalisation; for ImageNet, its mean and deviation are close to
    those of uniform bytes.
    """

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__(p=config.random_erasing, scale=(0.02, 1 / 3), value=0)

    def transform(self, inpt: Tensor, params: Json) -> Tensor:
        """Return the image with noise in the rectangle, or unchanged if there is none."""
        if params["v"] is None:
            return inpt
        noise = torch.randint(0, 256, (inpt.shape[-3], params["h"], params["w"]))
        return super().transform(inpt, {**params, "v": noise.to(inpt)})


class PolicyAugment:
    """timm's RandAugment with a policy string, on Pillow images.

    timm uses the generators of Python and NumPy, which are seeded from torch's here: the result only depends on the
    sample's key.
    """

    def __init__(self, config: AugmentConfig) -> None:
        from timm.data.auto_augment import posterize, rand_augment_transform  # takes 0.8 s, so only if needed

        mean = tuple(round(255 * value) for value in config.mean)
        filters = Image.Resampling  # Pillow's affine maps support two of them
        settings = {
            "translate_const": int(0.45 * min(config.image_size_hw)),
            "img_mean": mean if len(mean) > 1 else mean[0],
            "interpolation": filters.BILINEAR if config.interpolation == "bilinear" else filters.BICUBIC,
        }
        self._policy = rand_augment_transform(config.rand_augment, settings)
        for operation in self._policy.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the augmented image."""
        with rng.seeded_python(int(torch.randint(2**31, ()))):
            return self._policy(image)


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each channel; 0 bits, which timm may ask for and Pillow 13 refuses, give black."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)


def on_pillow(transform: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """Return a transform of Pillow images as one of uint8 [C, H, W], C 1 or 3."""
    return lambda image: v2.functional.pil_to_tensor(transform(v2.functional.to_pil_image(image)))


def random_affine(config: AugmentConfig) -> Callable[[Tensor], Tensor]:
    """Return the random affine map of `augment.affine`."""
    affine = config.affine
    return on_pillow(
        v2.RandomAffine(
            affine.degrees,
            translate=(affine.translate, affine.translate),
            scale=tuple(affine.scale),
            shear=[-affine.shear_degrees, affine.shear_degrees] * 2,
            interpolation=InterpolationMode.BILINEAR,
            fill=config.fill,
        )
    )


class ResizedCrop(v2.RandomResizedCrop):
    """The random crop of `augment`, resized to the image size."""

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__(config.image_size_hw, scale=config.crop_scale, ratio=config.crop_ratio)
        self._log_ratio = self._log_ratio.tolist()
        self.interpolation = config.interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """Return a random crop, resized."""
        return on_pixels(self.cut(image), resize, self.size, self.interpolation)

    def cut(self, image: Tensor) -> Tensor:
        """Return a random crop. Differs: v2 pads crops beyond the image; there are none."""
        top, left, height, width = self.draw(*image.shape[-2:])
        return image[:, top : top + height, left : left + width]

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop of an image. The method of torchvision takes 60 us."""
        least, most = self.scale
        low, high = self._log_ratio
        for area, ratio, down, right in torch.rand(_TRIES, 4).tolist():
            area = height * width * (least + (most - least) * area)
            ratio = math.exp(low + (high - low) * ratio)
            wide = round(math.sqrt(area * ratio))
            tall = round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                top = int(down * (height - tall + 1))
                left = int(right * (width - wide + 1))
                return top, left, tall, wide
        whole = torch.empty(()).expand(1, height, width)  # only the size is used
        return tuple(self.make_params([whole]).values())


class Mirror:
    """The horizontal flip of `augment`."""

    def __init__(self, config: AugmentConfig) -> None:
        self._share = config.horizontal_flip

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image, perhaps flipped."""
        return image.flip(-1) if self.draw() else image

    def draw(self) -> bool:
        """Draw whether to flip an image."""
        return bool(torch.rand(()) < self._share)
