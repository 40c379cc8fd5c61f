"""The shape of `data` and `augment`. Values and defaults are in conf/data/ and conf/augment/."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from utils.config.schema import Strict

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class _Data(Strict):
    """What every collection has. `validation_fraction` is used only where the collection has no validation split."""

    root: str
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    max_pixels: PositiveInt


class ImageFolderConfig(_Data):
    """A user's collection, read as it is: class folders, flat folders, sidecars, or a manifest."""

    name: Literal["image_folder"]


class GlyphsConfig(_Data):
    """The embedded collection; drawn into `root` when it is missing."""

    name: Literal["glyphs"]


DataConfig = Annotated[ImageFolderConfig | GlyphsConfig, Field(discriminator="name")]


class RandAugmentConfig(Strict):
    """RandAugment: `num_ops` operations in a row, at a magnitude of 0 to 30 (torchvision's bins; 9 is usual)."""

    num_ops: PositiveInt
    magnitude: Annotated[int, Field(ge=0, le=30)]


class AffineConfig(Strict):
    """A random turn of up to `degrees`, shift of up to `translate` of the sides, zoom within `scale`, and shear."""

    degrees: Annotated[float, Field(ge=0, le=180)]
    translate: Fraction
    scale: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
    shear_degrees: Annotated[float, Field(ge=0, lt=90)]


class AugmentConfig(Strict):
    """From a decoded image to the network's input.

    Training, in this order: `affine` where it is not null, on the decoded image (its cost grows with the image); a
    random crop of `crop_scale` of the area and `crop_ratio` width / height, resized; a mirror image with probability
    `horizontal_flip`; `rand_augment` where it is not null; random erasing with probability `random_erasing`. Uncovered
    pixels get the grey level `fill`. Evaluation: the shorter side resized to image size / `eval_crop`, centre crop.
    `mean` and `std` (of values in [0, 1], one per channel) are applied on the device.
    """

    image_size_hw: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    crop_scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
    crop_ratio: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
    horizontal_flip: Fraction
    affine: AffineConfig | None
    rand_augment: RandAugmentConfig | None
    random_erasing: Fraction
    fill: Annotated[int, Field(ge=0, le=255)]
    interpolation: Literal["bilinear", "bicubic"]
    eval_crop: Annotated[float, Field(gt=0, le=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]

    def preprocessing(self, channels: int) -> dict[str, Any]:
        """Return what evaluation does to an image, as it is written into weight files."""
        return {
            **self.model_dump(include={"image_size_hw", "interpolation", "eval_crop", "mean", "std"}),
            "channels": channels,
        }

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentConfig":
        ranges = {"crop_scale": self.crop_scale, "crop_ratio": self.crop_ratio}
        if self.affine is not None:
            ranges["affine.scale"] = self.affine.scale
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"augment.{name}: {low:g} to {high:g} does not rise; give the smaller number first")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"augment.std: {len(self.std)} numbers beside {len(self.mean)} in augment.mean; give one per channel"
            )
        return self
