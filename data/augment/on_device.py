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
from data.augment.transforms import IMAGES, NoiseErasing
from data.stream.order import Draw
from utils import rng
from utils.contracts import Batch

AUGMENT = "augment"
_MOST_NUMBERS = 11  # of a sample's draws
_LUMINANCE = (0.2989, 0.587, 0.114)  # as torchvision
_NOISE_DRAW = 0xE7A5E  # draw number for utils/rng.py; tasks use small numbers
_WIDTHS = (6, 4, 4)  # of a sample's parameters, [P=14]: `inverse_matrix`; the factors; the erased rectangle


class Augmentation(NamedTuple):
    """The random changes of one image, with the meaning of torchvision's arguments.

    angle, shear (x, y): degrees. translate (x, y): pixels of the resized image. factors: brightness, contrast,
    saturation (1: unchanged) and hue (0: unchanged). erased_px: top, left, height, width; height 0 erases nothing.
    """

    mirrored: bool = False
    angle: float = 0.0
    translate: tuple[int, int] = (0, 0)
    scale: float = 1.0
    shear: tuple[float, float] = (0.0, 0.0)
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
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
            factors = [between(1.0 - jitter.strength, 1.0 + jitter.strength) for _ in range(3)]
            change = change._replace(factors=(*factors, between(-jitter.hue, jitter.hue)))
        if self._erasing is not None and torch.rand(()) < self._erasing.p:
            erased = self._erasing.make_params([torch.zeros(()).expand(1, *self._size_hw)])  # only the size is used
            if erased["v"] is not None:  # None if no rectangle fits
                change = change._replace(erased_px=tuple(erased[name] for name in "ijhw"))
        return change

    def pack(self, change: Augmentation) -> Tensor:
        """Return the parameters for the device, float32 [P]."""
        matrix = inverse_matrix(change, self._size_hw)
        return torch.tensor([*matrix, *change.factors, *change.erased_px], dtype=torch.float32)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch with augmented images, without the parameters."""
        rest = {name: tensor for name, tensor in batch.items() if name != AUGMENT}
        return rest | {IMAGES: self.apply(batch[IMAGES], batch[AUGMENT], batch["key"])}

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return augmented images, uint8 [B, C, H, W]; parameters [B, P], keys [B] for the noise."""
        matrix, factors, erased_px = parameters.split(_WIDTHS, dim=1)
        changed = images
        if self._config.affine is not None:
            changed = sample_affine(images.float(), matrix, float(self._config.fill))
        elif self._config.horizontal_flip > 0:
            changed = torch.where(_per_image(matrix[:, 0] < 0), images.flip(-1), images)
        if self._config.color_jitter is not None:
            changed = change_colours(changed.float(), factors, turns_hue=self._config.color_jitter.hue > 0)
        if changed.is_floating_point():
            changed = changed.round_().clamp_(0, 255).to(torch.uint8)
        if self._erasing is None:
            return changed
        inside = rectangles(erased_px, changed.shape[-2:])
        return torch.where(inside, noise_of(keys, changed.shape), changed)


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


def change_colours(images: Tensor, factors: Tensor, *, turns_hue: bool) -> Tensor:
    """Change brightness, contrast, saturation and hue of float images from 0 to 255, in this order; factors [B, 4].

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
    inside = []
    for axis, count in enumerate(size_hw):
        indices = torch.arange(count, device=edges.device)
        first = edges[:, axis, None]
        inside.append((indices >= first) & (indices < first + edges[:, axis + 2, None]))
    rows, columns = inside
    return rows[:, None, :, None] & columns[:, None, None, :]
