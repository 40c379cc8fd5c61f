"""Steps of augmentation on the device: workers draw the parameters of each sample, the device changes whole batches.

On one device, results are bit-identical however a batch is split: every operation is elementwise or exact, in a
separate kernel (a fused multiply-add may round the end of an array differently). There is no host synchronisation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import _get_inverse_affine_matrix

from data.augment.config import AugmentConfig
from data.augment.transforms import NoiseErasing
from utils import rng

_LUMINANCE = (0.2989, 0.587, 0.114)  # as torchvision
_NOISE_DRAW = 0xE7A5E  # draw number for utils/rng.py; tasks use small numbers


class DeviceStep:
    """A step of whole batches. A subclass has three members:

    width: the number P of a sample's parameters. draw(): draws them from torch's generator, which the reader has
    seeded. apply(images, parameters, keys): returns the changed images [B, C, H, W], uint8 or float from 0 to 255;
    parameters: float32 [B, P]; keys: [B].
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config


def _draw_between(*ranges: Sequence[float]) -> list[float]:
    """Draw a number from each range. Draws by torchvision take far longer."""
    shares = torch.rand(len(ranges)).tolist()
    return [low + (high - low) * share for (low, high), share in zip(ranges, shares)]


def inverse_matrix(size_hw: Sequence[int], *affine: Any) -> list[float]:
    """Return the map from output to input coordinates, [2, 3] row by row; coordinates are -1 to 1 over the image.

    affine: as torchvision's arguments, angle, shift (x, y) in pixels, scale and shear (x, y).
    """
    height, width = size_hw
    xx, xy, x, yx, yy, y = _get_inverse_affine_matrix([0.0, 0.0], *affine)  # in pixels
    return [xx, xy * height / width, 2 * x / width, yx * width / height, yy, 2 * y / height]


class DeviceAffine(DeviceStep):
    """The affine map; its parameters are the six numbers of `inverse_matrix`."""

    width = 6

    def draw(self) -> list[float]:
        """Return the matrix of a sample."""
        affine = self.config.affine
        shifts = [affine.translate * side for side in reversed(self.config.image_size_hw)]
        limits = (affine.degrees, affine.shear_degrees, affine.shear_degrees, *shifts)
        angle, x_shear, y_shear, x, y, scale = _draw_between(*[(-limit, limit) for limit in limits], affine.scale)
        return inverse_matrix(self.config.image_size_hw, angle, (round(x), round(y)), scale, (x_shear, y_shear))

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return mapped images, float."""
        return sample_affine(images.float(), parameters, float(self.config.fill))


class DeviceMirror(DeviceStep):
    """The horizontal flip; its parameter is 1 or 0."""

    width = 1

    def draw(self) -> list[float]:
        """Return whether a sample is flipped."""
        return [float(torch.rand(()) < self.config.horizontal_flip)]

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return flipped images."""
        return torch.where(_per_image(parameters[:, 0] > 0), images.flip(-1), images)


class DeviceColours(DeviceStep):
    """Random colours; its parameters are the factors of `change_colours`."""

    width = 4

    def draw(self) -> list[float]:
        """Return the factors of a sample."""
        jitter = self.config.color_jitter
        factors = (1.0 - jitter.strength, 1.0 + jitter.strength)
        return _draw_between(factors, factors, factors, (-jitter.hue, jitter.hue))

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return images of other colours, float."""
        return change_colours(images.float(), parameters, turns_hue=self.config.color_jitter.hue > 0)


class DeviceErasing(DeviceStep):
    """Random erasing; its parameters are top, left, height and width of a rectangle. Height 0 erases nothing."""

    width = 4

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__(config)
        self._erasing = NoiseErasing(config)

    def draw(self) -> list[float]:
        """Return the rectangle of a sample."""
        size = torch.zeros(()).expand(1, *self.config.image_size_hw)  # only the size is used
        erased = self._erasing.make_params([size]) if torch.rand(()) < self._erasing.p else {"v": None}
        return [0.0] * 4 if erased["v"] is None else [erased[name] for name in "ijhw"]  # v: None if no rectangle fits

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return images with noise in the rectangles."""
        inside = rectangles(parameters, images.shape[-2:])
        return torch.where(inside, noise_of(keys, images.shape).to(images.dtype), images)


def noise_of(keys: Tensor, shape: torch.Size) -> Tensor:
    """Return noise from each sample's key: uniform bytes, uint8 [B, C, H, W], C at most 3."""
    words = (rng.uniform(keys, (1, *shape[-2:]), _NOISE_DRAW) * 2.0**24).to(torch.int32)  # 24 random bits
    return torch.cat([(words >> 8 * channel) & 255 for channel in range(shape[1])], dim=1).to(torch.uint8)


def _per_image(values: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def sample_affine(images: Tensor, matrices: Tensor, fill: float) -> Tensor:
    """Sample float images [B, C, H, W] bilinearly at `matrices` [B, 6] (inverse_matrix); outside is `fill`.

    The grid is not from F.affine_grid, whose matrix product may use TF32: an error of a tenth of a pixel at 224 px.
    Differs: torchvision applies the fill twice along the edge, so its edge is too faint.
    """
    # Pixel centres, in coordinates from -1 to 1 over the image.
    indices = (torch.arange(count, device=images.device, dtype=torch.float32) for count in images.shape[-2:])
    ys, xs = ((index + 0.5) * (2.0 / len(index)) - 1.0 for index in indices)
    rows = matrices.view(-1, 2, 3, 1, 1).unbind(1)
    grid = torch.stack([row[:, 0] * xs + (row[:, 1] * ys[:, None] + row[:, 2]) for row in rows], dim=-1)
    moved = F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.add_(fill)


def luminance(images: Tensor) -> Tensor:
    """Return the grey levels of images, [B, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, channel : channel + 1] * share for channel, share in enumerate(_LUMINANCE))
    return red.add_(green).add_(blue)


def exact_mean(grey: Tensor) -> Tensor:
    """Return the mean of each image [B] from levels [B, 1, H, W] in 0..255, to 1/256 of a level.

    A sum of integers, unlike one of floats, does not depend on how the device splits it, so not on the batch size.
    """
    total = (grey * 256.0).round_().to(torch.int64).sum(dim=(1, 2, 3))
    return total.float() / (256.0 * grey.shape[-2] * grey.shape[-1])


def change_colours(images: Tensor, factors: Tensor, *, turns_hue: bool) -> Tensor:
    """Change brightness, contrast, saturation and hue of float images from 0 to 255, in this order; factors [B, 4].

    The first three multiply, 1 changes nothing; the last turns hues, 0 changes nothing.
    Differs: torchvision draws the order, too.
    """
    brightness, contrast, saturation, hue = factors.unbind(1)
    images = (images * _per_image(brightness)).clamp_(0, 255)
    images = blend(images, contrast, _per_image(exact_mean(luminance(images))))
    images = blend(images, saturation, luminance(images))
    return turn_hue(images, hue) if turns_hue and images.shape[1] == 3 else images


def blend(images: Tensor, factors: Tensor, target: Tensor) -> Tensor:
    """Return factor x image + (1 - factor) x target, from 0 to 255; factors [B]."""
    return (images * _per_image(factors)).add_(target * _per_image(1.0 - factors)).clamp_(0, 255)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of float RGB images [B, 3, H, W] by `turns` [B] of the colour circle.

    Source: HSV to RGB, f(n) = v - v s max(0, min(k, 4 - k, 1)) with k = (n + h / 60 degrees) mod 6.
    """
    red, green, blue = images.unbind(1)
    high = images.amax(dim=1)
    low = images.amin(dim=1)
    span = high - low
    divisor = torch.where(span > 0, span, 1.0)
    hue = torch.where(high == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0)
    hue = torch.where(high == red, (green - blue) / divisor, hue) + (turns * 6.0).view(-1, 1, 1)
    channels = []
    for start in (5.0, 3.0, 1.0):
        sector = (hue + start) % 6.0
        channels.append(high - torch.minimum(sector, 4.0 - sector).clamp_(0, 1) * span)
    return torch.stack(channels, dim=1)


def rectangles(edges: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Return masks [B, 1, H, W], True inside the rectangle of each sample; edges [B, 4]: top, left, height, width."""
    top, left, height, width = edges[:, :, None].unbind(1)  # [B, 1] each
    rows, columns = (torch.arange(count, device=edges.device) for count in size_hw)
    inside_rows = (rows >= top) & (rows < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
