"""Augmentation on the device: workers draw the parameters of each sample, the device applies them to whole batches.

The parameters are a view of the sample, drawn from its key. On one device, results are bit-identical however a step is
split: every operation is elementwise or exact, in a separate kernel (a fused multiply-add may round the end of an array
differently). Images stay bytes; float results are rounded once, at the end. There is no host synchronisation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import _get_inverse_affine_matrix

from data.augment.config import AugmentConfig
from data.augment.transforms import NoiseErasing
from data.stream.order import Draw
from utils import rng
from utils.contracts import Batch

IMAGES = "images"
AUGMENT = "augment"
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = _CHANGES = range(4)
_BLENDS = (_BRIGHTNESS, _CONTRAST, _SATURATION)
_NONE = -1
_MOST_NUMBERS = 15  # of a sample's draws
_LUMINANCE = (0.2989, 0.587, 0.114)  # as torchvision
_NOISE_DRAW = 0xE7A5E  # draw number for utils/rng.py; tasks use small numbers


# The parameters of a sample, [P=20]: `inverse_matrix`; the factors; the blends before and after the hue, as numbers of
# brightness, contrast and saturation in order of application, padded with -1; the erased rectangle.
_WIDTHS = (6, 4, len(_BLENDS), len(_BLENDS), 4)


class Augmentation(NamedTuple):
    """The random changes of one image, with the meaning of torchvision's arguments.

    angle, shear (x, y): degrees. translate (x, y): pixels of the resized image. factors: brightness, contrast,
    saturation (1: unchanged) and hue (0: unchanged); order: the order of these four. erased_px: top, left, height,
    width; height 0 erases nothing.
    """

    mirrored: bool = False
    angle: float = 0.0
    translate: tuple[int, int] = (0, 0)
    scale: float = 1.0
    shear: tuple[float, float] = (0.0, 0.0)
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    order: tuple[int, ...] = (0, 1, 2, 3)
    erased_px: tuple[int, int, int, int] = (0, 0, 0, 0)


def inverse_matrix(change: Augmentation, size_hw: Sequence[int]) -> list[float]:
    """Return the map from output to input coordinates, [2, 3] row by row; coordinates are -1 to 1 over the image.

    The flip comes last.
    """
    centre = [0.0, 0.0]
    height, width = size_hw
    sign = -1.0 if change.mirrored else 1.0
    xx, xy, x, yx, yy, y = _get_inverse_affine_matrix(  # in pixels
        centre, change.angle, change.translate, change.scale, change.shear
    )
    return [sign * xx, xy * height / width, 2 * x / width, sign * yx * width / height, yy, 2 * y / height]


class DeviceAugment:
    """A view that draws the parameters of a sample, and a hook that applies them to a batch on the device."""

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config
        self._size_hw = tuple(config.image_size_hw)
        self._erasing = NoiseErasing(config) if config.random_erasing > 0 else None
        self._turns_hue = config.color_jitter is not None and config.color_jitter.hue > 0

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the parameters of a sample, float32 [P]."""
        return self.pack(self.draw())

    def draw(self) -> Augmentation:
        """Draw from torch's generator, which the reader has seeded. Torchvision's own draws take far longer."""
        affine, jitter = self._config.affine, self._config.color_jitter
        numbers = iter(torch.rand(_MOST_NUMBERS).tolist())

        def between(low: float, high: float) -> float:
            return low + (high - low) * next(numbers)

        change = Augmentation(next(numbers) < self._config.horizontal_flip)
        if affine is not None:
            shifts = [affine.translate * side for side in reversed(self._size_hw)]
            angle = between(-affine.degrees, affine.degrees)
            moved = tuple(round(between(-shift, shift)) for shift in shifts)
            scale = between(*affine.scale)
            shear = tuple(between(-affine.shear_degrees, affine.shear_degrees) for _ in range(2))
            change = change._replace(angle=angle, translate=moved, scale=scale, shear=shear)
        if jitter is not None:
            ranges = (jitter.brightness, jitter.contrast, jitter.saturation)
            factors = [between(max(0.0, 1.0 - most), 1.0 + most) for most in ranges]
            places = [next(numbers) for _ in _CHANGES]
            change = change._replace(
                factors=(*factors, between(-jitter.hue, jitter.hue)),
                order=tuple(sorted(range(len(places)), key=places.__getitem__)),
            )
        if self._erasing is not None and torch.rand(()) < self._erasing.p:
            erased = self._erasing.make_params([torch.zeros(()).expand(1, *self._size_hw)])  # only the size is used
            if erased["v"] is not None:  # None if no rectangle fits
                change = change._replace(erased_px=tuple(erased[name] for name in "ijhw"))
        return change

    def pack(self, change: Augmentation) -> Tensor:
        """Return the parameters for the device, float32 [P]."""
        hue_index = change.order.index(_HUE) if self._turns_hue else len(change.order)
        parts = change.order[:hue_index], change.order[hue_index:]
        before, after = ([number for number in part if number in _BLENDS] for part in parts)
        padded = [*before, *[_NONE] * len(after), *after, *[_NONE] * len(before)]
        matrix = inverse_matrix(change, self._size_hw)
        return torch.tensor([*matrix, *change.factors, *padded, *change.erased_px], dtype=torch.float32)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch with augmented images, without the parameters."""
        rest = {name: tensor for name, tensor in batch.items() if name != AUGMENT}
        return rest | {IMAGES: self.apply(batch[IMAGES], batch[AUGMENT], batch["key"])}

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return augmented images, uint8 [B, C, H, W]; parameters [B, P], keys [B] for the noise."""
        matrix, factors, before_hue, after_hue, erased_px = parameters.split(_WIDTHS, dim=1)
        changed = images
        if self._config.affine is not None:
            changed = sample_affine(images.float(), matrix, float(self._config.fill))
        elif self._config.horizontal_flip > 0:
            changed = torch.where(_per_image(matrix[:, 0] < 0), images.flip(-1), images)
        if self._config.color_jitter is not None:
            changed = self._change_colours(changed.float(), factors, before_hue, after_hue)
        if changed.is_floating_point():
            changed = changed.round_().clamp_(0, 255).to(torch.uint8)
        if self._erasing is None:
            return changed
        inside = rectangles(erased_px, changed.shape[-2:])
        return torch.where(inside, self._noise(keys, changed.shape), changed)

    def _change_colours(self, images: Tensor, factors: Tensor, before_hue: Tensor, after_hue: Tensor) -> Tensor:
        """Apply brightness, contrast, saturation and hue in the order of each sample; float images from 0 to 255."""
        for number in before_hue.unbind(1):
            images = blend(images, factors, number)
        if not self._turns_hue:
            return images
        if images.shape[1] == 3:
            images = turn_hue(images, factors[:, _HUE])
        for number in after_hue.unbind(1):
            images = blend(images, factors, number)
        return images

    def _noise(self, keys: Tensor, shape: torch.Size) -> Tensor:
        """Return noise from each sample's key, uint8 [B, C, H, W]: uniform bytes, or normal with mean and std."""
        _, channels, height, width = shape
        if self._config.erasing_noise == "uniform":
            words = (rng.uniform(keys, (1, height, width), _NOISE_DRAW) * 2.0**24).to(torch.int32)  # 24 random bits
            return torch.cat([(words >> 8 * channel) & 255 for channel in range(channels)], dim=1).to(torch.uint8)
        noise = rng.normal(keys, (channels, height, width), _NOISE_DRAW)
        for channel, (mean, std) in enumerate(zip(self._config.mean, self._config.std)):
            noise[:, channel].mul_(255.0 * std).add_(255.0 * mean)
        return noise.round_().clamp_(0, 255).to(torch.uint8)


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
    xs = xs.view(1, 1, -1)
    ys = ys.view(1, -1, 1)
    rows = matrices.view(-1, 2, 3, 1, 1)
    grid = images.new_empty(len(images), *images.shape[-2:], 2)
    for row, into in zip(rows.unbind(1), grid.unbind(-1)):
        torch.add(row[:, 0] * xs, row[:, 1] * ys + row[:, 2], out=into)
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


def blend(images: Tensor, factors: Tensor, number: Tensor) -> Tensor:
    """Change brightness, contrast or saturation of float images from 0 to 255.

    factors: [B, 4]. number: the change for each image, [B]; other numbers leave an image unchanged.
    The result is factor x image + (1 - factor) x target; the target is black, the mean grey, or the grey levels.
    """
    chosen = number[:, None] == torch.arange(len(_BLENDS), device=number.device)
    factor = torch.where(chosen, factors[:, : len(_BLENDS)], 0.0).sum(dim=1) + (~chosen.any(dim=1))
    grey = luminance(images)
    mean = _per_image(exact_mean(grey) * chosen[:, _CONTRAST])
    target = torch.where(_per_image(chosen[:, _SATURATION]), grey, mean) * _per_image(1.0 - factor)
    return (images * _per_image(factor)).add_(target).clamp_(0, 255)


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
    inside = []
    for first, length, count in ((edges[:, 0], edges[:, 2], size_hw[0]), (edges[:, 1], edges[:, 3], size_hw[1])):
        indices = torch.arange(count, device=edges.device)[None, :]
        inside.append((indices >= first[:, None]) & (indices < (first + length)[:, None]))
    rows, columns = inside
    return rows[:, None, :, None] & columns[:, None, None, :]
