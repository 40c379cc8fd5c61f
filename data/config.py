"""The shape of `data` and `augment`. Values and defaults are in conf/data/ and conf/augment/."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from utils.canvas import Background
from utils.config.bounds import BelowOne, Count, Fraction, Pixels, Share, Side
from utils.config.schema import PathText, Strict

_Jitter = Annotated[float, Field(ge=0, le=100)]
_Zoom = Annotated[float, Field(ge=0.01, le=100)]
_POLICY = re.compile(r"rand(-(m\d{1,2}|n[1-9]\d?|p[01]?\.?\d*|mstd\d{1,3}(\.\d*)?|mmax\d{1,2}|inc[01]))*")


class CacheConfig(Strict):
    """Where decoded images are kept (docs/caches.md).

    memory_gib: in the shared memory of a node, while training; 0: none. disk_gib: the most that the file in `folder`
    takes; 0: none. format: raw keeps the pixels; jpeg and webp, at `quality`, are part of the recipe, because the run
    then sees what they leave of an image.
    """

    memory_gib: Literal["auto"] | Annotated[float, Field(ge=0, le=1e6)]
    folder: PathText
    disk_gib: Annotated[float, Field(ge=0, le=65_536)]
    format: Literal["raw", "jpeg", "webp"]
    quality: Annotated[int, Field(ge=1, le=100)]

    @model_validator(mode="after")
    def _is_kept_where_it_is_lossy(self) -> "CacheConfig":
        if self.format != "raw" and self.disk_gib == 0:
            raise ValueError(
                f"data.cache.format: {self.format} without a cache; set data.cache.disk_gib above 0, or "
                "data.cache.format=raw"
            )
        return self


_DEFAULT_CACHE = CacheConfig(memory_gib="auto", folder="outputs/cache/images", disk_gib=0.0, format="raw", quality=90)


class _Data(Strict):
    """What every collection has. `validation_fraction` is used only where the collection has no validation split.

    background: under transparent images; null: white in training, and what the weights state elsewhere. icc: convert
    images from their colour profile to sRGB; elsewhere also where the weights state it.
    """

    root: PathText
    validation_fraction: BelowOne
    max_pixels: Pixels
    background: Background | None = None  # configurations of before do not state it, nor icc and cache
    icc: bool = False
    cache: CacheConfig = _DEFAULT_CACHE


class ImageFolderConfig(_Data):
    """A user's collection, read as it is: class folders, flat folders, sidecars, or a manifest."""

    name: Literal["image_folder"]


class GlyphsConfig(_Data):
    """The embedded collection; drawn into `root` when it is missing."""

    name: Literal["glyphs"]


DataConfig = Annotated[ImageFolderConfig | GlyphsConfig, Field(discriminator="name")]


class TextConfig(Strict):
    """How predict.py writes the tags of an image.

    max_tags: the most probable ones; null: all. exclude: tags in any spelling. rating: where it stands, as
    `rating:general`; null: nowhere. spaces: for underscores, but for kaomoji. escape: parentheses, by a backslash.
    """

    order: Literal["score", "vocabulary", "characters_first"]
    max_tags: Count | None
    exclude: list[str]
    rating: Literal["first", "last"] | None
    spaces: bool
    escape: bool
    separator: Annotated[str, Field(min_length=1)]


class TagRulesConfig(Strict):
    """What the tags of a collection mean.

    rating_s: what the ratings s and safe mean; null where there are none. aliases, implications: CSV files of two
    columns.
    """

    rating_s: Literal["sensitive", "general"] | None
    aliases: PathText | None
    implications: PathText | None


class VocabularyConfig(TagRulesConfig):
    """What is taken into a vocabulary.

    min_count: images of the training split that a tag needs. ignore, keep: lists of tags, one a line. append_to: a
    vocabulary that keeps its rows, and gets new ones behind them.
    """

    min_count: Count
    categories: list[Literal["general", "artist", "copyright", "character", "meta"]]
    ignore: PathText | None
    keep: PathText | None
    append_to: PathText | None


class AffineConfig(Strict):
    """A random turn of up to `degrees`, shift of up to `translate` of the sides, zoom within `scale`, and shear."""

    degrees: Annotated[float, Field(ge=0, le=180)]
    translate: Fraction
    scale: Annotated[list[_Zoom], Field(min_length=2, max_length=2)]
    shear_degrees: Annotated[float, Field(ge=0, le=85)]


class ColorJitterConfig(Strict):
    """Random changes of colour, in a random order.

    brightness, contrast, saturation: b means a factor between max(0, 1 - b) and 1 + b. hue: h means a turn of the
    colour circle by -h to h, in turns. Saturation and hue do nothing to grey images. Source: torchvision's ColorJitter.
    """

    brightness: _Jitter
    contrast: _Jitter
    saturation: _Jitter
    hue: Annotated[float, Field(ge=0, le=0.5)]


class AugmentConfig(Strict):
    """From a decoded image to the network's input.

    `pad` square puts the whole image into the middle of a square of the background, first, in training and evaluation.
    buckets: of the nearest of several shapes (data/buckets.py: letterbox_sizes), each with as many pixels as
    `image_size_hw` or fewer; `crop_ratio` is then relative to that shape. Programs that show one size show the square.
    Training, in this order: `affine` where it is not null, on the decoded image (its cost grows with the image); a
    random crop of `crop_scale` of the area and `crop_ratio` width / height, resized; a mirror image with probability
    `horizontal_flip`; `color_jitter` where it is not null; `rand_augment`, a policy of timm, where it is not null,
    which fills with the mean; random erasing with probability `random_erasing`, by `uniform` noise or by `normal` noise
    of `mean` and `std`. Pixels that the affine map uncovers get the grey level `fill`. Evaluation: `crop` resizes the
    shorter side to image size / `eval_crop` and takes the centre, `squash` resizes both sides. `interpolation` varied
    draws one of the others for each training image, and is bicubic in evaluation. `mean` and `std` (of values in
    [0, 1], one per channel) are applied on the device.

    `on_device` true: the workers decode, crop and resize, and the rest runs on the device, on whole batches
    (data/device_augment.py). The draws have the same distributions. What differs: `affine` acts on the resized image,
    so its shift is a share of the image size, no crop follows that could cut off what it uncovers, and its one bilinear
    sampling blurs a little what the resize has made sharp; `color_jitter` rounds once at the end and not after each
    change.

    `shrink` true: an image that is larger than crops need is resized when it is decoded (data/cache/size.py).
    """

    image_size_hw: Annotated[list[Side], Field(min_length=2, max_length=2)]
    pad: Literal["none", "square", "buckets"]
    crop_scale: Annotated[list[Share], Field(min_length=2, max_length=2)]
    crop_ratio: Annotated[list[_Zoom], Field(min_length=2, max_length=2)]
    horizontal_flip: Fraction
    affine: AffineConfig | None
    color_jitter: ColorJitterConfig | None
    rand_augment: str | None
    random_erasing: Fraction
    erasing_noise: Literal["uniform", "normal"]
    fill: Annotated[int, Field(ge=0, le=255)]
    on_device: bool
    shrink: bool = False  # configurations of before do not state it
    interpolation: Literal["bilinear", "bicubic", "lanczos", "area", "varied"]
    eval_resize: Literal["crop", "squash"]
    eval_crop: Annotated[float, Field(ge=0.1, le=1)]
    mean: list[Fraction]
    std: list[Annotated[float, Field(ge=1e-6, le=1e6)]]

    def preprocessing(self, channels: int) -> dict[str, Any]:
        """Return what evaluation does to an image, as it is written into weight files."""
        return {
            **self.model_dump(include={"image_size_hw", "eval_resize", "eval_crop", "mean", "std"}),
            "pad": "square" if self.pad == "buckets" else self.pad,
            "interpolation": "bicubic" if self.interpolation == "varied" else self.interpolation,
            "channels": channels,
        }

    def describe(self, task_mirrors: bool) -> str:
        """Return the image size and the augmentation in a line; task_mirrors: whether the task mirrors."""
        height, width = self.image_size_hw
        shapes = {"none": [], "square": ["padded to a square"], "buckets": ["padded to the nearest of several shapes"]}
        steps = shapes[self.pad]
        steps += [f"crops of {self.crop_scale[0]:.0%} to {self.crop_scale[1]:.0%}"] if self.crop_scale[0] < 1 else []
        steps += ["mirror" if self.horizontal_flip or task_mirrors else "no mirror"]
        steps += ["affine map"] if self.affine is not None else []
        steps += ["colours"] if self.color_jitter is not None else []
        steps += [self.rand_augment] if self.rand_augment is not None else []
        steps += ["random erasing"] if self.random_erasing else []
        return f"{height} x {width} px; {', '.join(steps)}"

    @field_validator("rand_augment")
    @classmethod
    def _is_a_policy(cls, policy: str | None) -> str | None:
        # timm ignores sections that it does not know.
        if policy is not None and not _POLICY.fullmatch(policy):
            raise ValueError(
                f"{policy!r} is no policy; give rand with sections of m, n, p, mstd, mmax and inc, each with a number, "
                "such as rand-m9-mstd0.5-inc1 (timm.data.auto_augment.rand_augment_transform)"
            )
        return policy

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentConfig":
        ranges = {"crop_scale": self.crop_scale, "crop_ratio": self.crop_ratio}
        if self.affine is not None:
            ranges["affine.scale"] = self.affine.scale
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"augment.{name}: {low:g} to {high:g} does not rise; give the smaller number first")
        return self

    @model_validator(mode="after")
    def _one_std_per_mean(self) -> "AugmentConfig":
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"augment.std: {len(self.std)} numbers beside {len(self.mean)} in augment.mean; give one per channel"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_for_workers(self) -> "AugmentConfig":
        if self.on_device and self.rand_augment is not None:
            raise ValueError(
                f"augment.on_device: true, and augment.rand_augment ({self.rand_augment}) runs on Pillow's images in "
                "the workers; set augment.on_device=false, or augment.rand_augment=null and augment.color_jitter"
            )
        return self
