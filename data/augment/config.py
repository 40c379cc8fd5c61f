"""The schema of `augment`. Values and defaults are in conf/augment/."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from utils.config.bounds import Fraction, Share, SizeHW, Two, between
from utils.config.schema import Strict
from utils.io.files import Json

_Zoom = between(float, 0.01, 100)
_POLICY = r"^rand(-(m\d{1,2}|n[1-9]\d?|p[01]?\.?\d*|mstd\d{1,3}(\.\d*)?|mmax\d{1,2}|inc[01]))*$"


def _rises(bounds: list[float]) -> list[float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{bounds[0]:g} to {bounds[1]:g} is decreasing; give the smaller number first")
    return bounds


_Zooms = Annotated[Two[_Zoom], AfterValidator(_rises)]


class AffineConfig(Strict):
    """A random rotation by up to `degrees`, shift by up to `translate` of the sides, zoom within `scale`, and shear."""

    degrees: between(float, 0, 180)
    translate: Fraction
    scale: _Zooms
    shear_degrees: between(float, 0, 85)


class ColorJitterConfig(Strict):
    """Random changes of colour.

    strength: brightness, contrast and saturation each change by a factor between 1 - strength and 1 + strength. hue: h
    means a rotation of the colour circle by -h to h turns. Saturation and hue do not change grey images.
    Source: torchvision's ColorJitter.
    """

    strength: Fraction
    hue: between(float, 0, 0.5)


class AugmentConfig(Strict):
    """From a decoded image to the network's input. data/augment/steps.py has the steps of training in their order.

    With `on_device`, the device makes the steps that it can, on whole batches and after the steps of the workers, from
    draws of the same ranges. Differs: `affine` acts on the resized image. So its shift is relative to the image size,
    no crop can remove the uncovered area, and its bilinear sampling blurs the image a little. `color_jitter` changes
    brightness, contrast, saturation and hue in this order, and rounds once.
    """

    image_size_hw: SizeHW
    pad: Literal["none", "square"]  # square, also in evaluation: the whole image, centred on a square of the background
    affine: AffineConfig | None  # acts on the decoded image; its cost grows with the image size
    fill: between(int, 0, 255)  # the grey level of the area that the affine map uncovers
    crop_scale: Annotated[Two[Share], AfterValidator(_rises)]  # share of the area
    crop_ratio: _Zooms  # width / height
    interpolation: Literal["bilinear", "bicubic"]  # the resize filter
    horizontal_flip: Fraction
    color_jitter: ColorJitterConfig | None
    # A policy of timm, which fills with the mean and ignores unknown sections.
    rand_augment: Annotated[str, Field(pattern=_POLICY)] | None
    random_erasing: Fraction
    on_device: bool
    shrink: bool  # reduce large images to the size that crops need when decoding (`shortest_px`)
    # crop: resize the shorter side to image size / `eval_crop`, then take the centre. squash: resize both sides.
    eval_resize: Literal["crop", "squash"]
    eval_crop: between(float, 0.1, 1)
    mean: list[Fraction]  # for values in [0, 1], one per channel; applied on the device
    std: list[between(float, 1e-6, 1e6)]

    def preprocessing(self, channels: int) -> Json:
        """Return the preprocessing of evaluation, as weight files store it."""
        names = {"image_size_hw", "pad", "eval_resize", "eval_crop", "interpolation", "mean", "std"}
        return {**self.model_dump(include=names), "channels": channels, "shortest_px": self.shortest_px()}

    def shortest_px(self) -> int | None:
        """Return the shorter side in pixels to which `shrink` reduces images, or None; no crop is enlarged after it.

        This is the larger of two bounds. Evaluation resizes to image size / `eval_crop`, or to the image size. A
        training crop covers at least `crop_scale` of the area: for shorter side s and ratio r = width / height, it is
        at least s sqrt(scale r) wide and s sqrt(scale / r) high; if no crop fits, s or s times the nearest ratio.
        A worker's affine map enlarges the content at most by its zoom and both shears. A padded image is a square of
        the longer side, so the bound also holds for it.
        """
        if not self.shrink:
            return None
        height, width = self.image_size_hw
        evaluation = max(height, width) / (self.eval_crop if self.eval_resize == "crop" else 1)
        scale = self.crop_scale[0]
        least, most = self.crop_ratio
        wide = max(1 / math.sqrt(scale * least), 1 / most)
        high = max(math.sqrt(most / scale), least)
        stretch = 1.0
        affine = self.affine
        if affine is not None and not self.on_device:
            stretch = max(1.0, affine.scale[1] * (1 + math.tan(math.radians(affine.shear_degrees))) ** 2)
        return math.ceil(max(evaluation, stretch * max(width * wide, height * high)))
