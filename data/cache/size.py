"""The size rule: how far an image may be shrunk when it is decoded, so that no crop is enlarged because of it.

An image whose shorter side is longer than `shortest_px` is resized to it when it is decoded; a smaller one stays as it
is. The rule depends on `augment` alone and holds with and without a cache, so a run's pixels depend neither on what a
cache has nor on the memory that is free. It is off where `augment.shrink` is false.
"""

import math

from data.config import AffineConfig, AugmentConfig


def shortest_px_for(augment: AugmentConfig) -> int | None:
    """Return the shorter side in pixels that the augmentation needs of an image; None: all of it.

    The bound is the larger of two. Evaluation resizes to image size / `eval_crop`, or to the image size. Training takes
    a crop of at least `crop_scale` of the area; of an image with shorter side s it is, at a ratio r = width / height,
    at least s sqrt(scale r) wide and s sqrt(scale / r) high, and where no crop fits, s or s times the nearest ratio.
    A worker's affine map enlarges the crop's content at most by its zoom and both shears. A padded image is a square of
    the longer side, so the bound holds for it, too.
    """
    if not augment.shrink:
        return None
    height, width = augment.image_size_hw
    evaluation = max(height, width) / (augment.eval_crop if augment.eval_resize == "crop" else 1)
    scale, (least, most) = augment.crop_scale[0], augment.crop_ratio
    wide = max(1 / math.sqrt(scale * least), 1 / most)
    high = max(math.sqrt(most / scale), least)
    stretch = 1.0 if augment.affine is None or augment.on_device else _stretch(augment.affine)
    return math.ceil(max(evaluation, stretch * max(width * wide, height * high)))


def preprocessing_of(augment: AugmentConfig, channels: int) -> dict:
    """Return what evaluation does to an image (AugmentConfig.preprocessing), with `shortest_px` where it is shrunk."""
    shortest_px = shortest_px_for(augment)
    return {**augment.preprocessing(channels), **({} if shortest_px is None else {"shortest_px": shortest_px})}


def _stretch(affine: AffineConfig) -> float:
    """Return how many times an affine map enlarges a length at most, 1 or more."""
    return max(1.0, affine.scale[1] * (1 + math.tan(math.radians(affine.shear_degrees))) ** 2)
