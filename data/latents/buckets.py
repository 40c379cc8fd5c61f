"""Buckets: the training sizes for images of many shapes, and how an image is fitted into one.

    buckets = make_buckets(collection, rows, image_sizes(collection, rows, cache), config)
    fit = fit_into(size_hw, bucket_hw, choose_corner)
    pixels = place(image, fit, flip=False)

Sizes are (height, width) in pixels, after EXIF rotation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.collection.collection import Collection
from data.images.pixels import read_upright_size, resize
from data.layouts.table import show_some
from data.stream.order import Draw, Views
from data.stream.source import UnreadableImage
from utils import rng
from utils.config.bounds import Fraction, Pixels, Share, Side
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.memo import in_threads, measure_once
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

_UnitSide = Annotated[Side, Field(multiple_of=32)]  # the VAE reduces by 8, the U-Net by another 4
_FIT_DRAW = 3  # counter for a sample's key; the loader uses 1 and 2
SIZES = Path("outputs/cache/upright_sizes.jsonl")


class BucketConfig(Strict):
    """The sizes, and what happens to images that fit none of them well.

    The default sizes are a square of about `area_px`, and for every side from `min_px` to `max_px` in steps of
    `step_px` the longest other side with an area of at most `area_px`; sizes_hw replaces them. crop: the crop position.
    small: an image that would be enlarged more than `max_upscale` times is enlarged anyway (keep), skipped (drop), or
    trained at its own size, rounded down to `step_px` (native). An image that would lose more than `max_crop` of its
    area is skipped. flip: probability of a horizontal flip.
    Source: NovelAI/novelai-aspect-ratio-bucketing; kohya-ss/sd-scripts:library/model_util.py.
    """

    area_px: Pixels
    step_px: _UnitSide
    min_px: _UnitSide
    max_px: _UnitSide
    sizes_hw: Annotated[list[Annotated[list[_UnitSide], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None
    crop: Literal["centre", "random"]
    small: Literal["keep", "drop", "native"]
    max_upscale: Annotated[float, Field(ge=1, le=1000)]
    max_crop: Share
    flip: Fraction

    def sizes(self) -> np.ndarray:
        """Return the sizes, int64 [K, 2]."""
        if self.sizes_hw is not None:
            return np.array(self.sizes_hw, dtype=np.int64)
        return sdxl_sizes(self.area_px, self.step_px, self.min_px, self.max_px)

    @model_validator(mode="after")
    def _has_a_square(self) -> "BucketConfig":
        if not self.min_px**2 <= self.area_px <= self.max_px**2:
            raise ValueError(
                f"task.buckets.area_px: {self.area_px} is not between min_px x min_px and max_px x max_px, "
                f"{self.min_px**2} and {self.max_px**2}; change one of them"
            )
        return self


def sdxl_sizes(area_px: int, step_px: int, min_px: int, max_px: int) -> np.ndarray:
    """Return the default sizes (see `BucketConfig`), int64 [K, 2], sorted."""
    square = math.isqrt(area_px) // step_px * step_px
    sizes = {(square, square)}
    for side in range(min_px, max_px + 1, step_px):
        other = min(area_px // side // step_px * step_px, max_px)
        if other >= min_px:
            sizes |= {(side, other), (other, side)}
    return np.array(sorted(sizes), dtype=np.int64)


def letterbox_sizes(image_size_hw: Sequence[int], unit_px: int) -> np.ndarray:
    """Return the sizes of `augment.pad=buckets`, int64 [K, 2], sorted.

    Sides are multiples of `unit_px`, areas at most the area of `image_size_hw`, and ratios from 1:2 to 2:1.
    """
    area, unit_area = math.prod(image_size_hw), unit_px**2
    least, most = math.isqrt(-(-area // (2 * unit_area)) - 1) + 1, math.isqrt(2 * area // unit_area)
    return sdxl_sizes(area, unit_px, least * unit_px, most * unit_px)


def letterbox_groups(collection: Collection, rows: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray | None:
    """Return the bucket with the nearest ratio for each row, int64 [N]; unreadable images count as squares.

    Returns None if the preprocessing has no buckets.
    """
    buckets_hw = preprocessing.get("buckets_hw")
    if buckets_hw is None:
        return None
    return assign(np.maximum(image_sizes(collection, rows, SIZES), 1), np.array(buckets_hw))


def assign(sizes_hw: np.ndarray, buckets_hw: np.ndarray) -> np.ndarray:
    """Return the bucket with the nearest log(height / width) for each size: int64 [N]."""
    ratios = np.log(buckets_hw[:, 0] / buckets_hw[:, 1])
    order = np.argsort(ratios, kind="stable")
    between = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(between, np.log(sizes_hw[:, 0] / sizes_hw[:, 1]))]


class Fit(NamedTuple):
    """How images fill their buckets: resize, optional flip, crop; each field is int64 [..., 2].

    crop_top_left: in the resized and flipped image, so it matches what the network sees. (If the crop came before the
    flip, its left edge would have to be flipped, too: huggingface/diffusers#6547.)
    """

    original_hw: np.ndarray
    resized_hw: np.ndarray
    crop_top_left: np.ndarray
    target_hw: np.ndarray

    def conditions(self) -> np.ndarray:
        """Return the size conditioning of SDXL (time_ids), [..., 6]."""
        return np.concatenate([self.original_hw, self.crop_top_left, self.target_hw], axis=-1)


def fit_into(
    size_hw: np.ndarray, bucket_hw: np.ndarray, choose_corner: Callable[[np.ndarray], np.ndarray] | None = None
) -> Fit:
    """Return how images fill buckets, int64 [..., 2], at the smallest size that covers the bucket.

    choose_corner: maps the excess size to the corners of the crops; None: centre crops.
    """
    zoom = (bucket_hw / size_hw).max(axis=-1, keepdims=True)
    resized_hw = np.maximum(bucket_hw, np.round(size_hw * zoom).astype(np.int64))
    slack = resized_hw - bucket_hw
    corner = slack // 2 if choose_corner is None else choose_corner(slack)
    return Fit(*np.broadcast_arrays(size_hw, resized_hw, corner, bucket_hw))


def place(image: Tensor, fit: Fit, flip: bool) -> Tensor:
    """Resize, flip and crop an image [C, H, W] into its bucket: [C, h, w]."""
    image = resize(image, fit.resized_hw.tolist(), "bicubic")
    (top, left), (height, width) = fit.crop_top_left.tolist(), fit.target_hw.tolist()
    return (image.flip(-1) if flip else image)[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Buckets:
    """The buckets of a collection's rows.

    rows: rows with a bucket, int64 [N], ascending. groups: the bucket of each, an index into `sizes_hw` [K, 2].
    image_hw [N, 2]: the image sizes. dropped: rows without a bucket, by reason.
    """

    rows: np.ndarray
    groups: np.ndarray
    sizes_hw: np.ndarray
    image_hw: np.ndarray
    dropped: dict[str, np.ndarray]

    def describe(self) -> str:
        """Describe the buckets and the cropped area in one line."""
        zoom, lost = _measure_fit(self.image_hw, self.sizes_hw[self.groups])
        areas = self.sizes_hw.prod(axis=1)
        enlarged = np.count_nonzero(zoom > 1)
        return (
            f"{len(self.sizes_hw)} buckets of {areas.min():,} to {areas.max():,} px for {len(self.rows):,} images; "
            f"cropped {lost.mean():.1%} of the area in the mean, {lost.max():.1%} at worst; {enlarged:,} enlarged"
            + (f", up to {zoom.max():.1f} times" if enlarged else "")
            + "".join(f"; {len(rows):,} dropped: {reason}" for reason, rows in self.dropped.items())
        )

    def number_of(self, row: int) -> int:
        """Return the index of a row in `rows`."""
        return int(np.searchsorted(self.rows, row))


def _measure_fit(image_hw: np.ndarray, target_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the enlargement of each image, and the cropped share of its area, float64 [N]."""
    zoom = (target_hw / image_hw).max(axis=1)
    return zoom, 1 - (target_hw / (image_hw * zoom[:, None])).prod(axis=1)


def make_buckets(collection: Collection, rows: np.ndarray, sizes_hw: np.ndarray, config: BucketConfig) -> Buckets:
    """Assign rows with sizes [N, 2] (0 if unknown) to buckets; warn of rows without one."""
    known = (sizes_hw > 0).all(axis=1)
    sizes_hw = np.maximum(sizes_hw, 1)
    buckets = config.sizes()
    target = buckets[assign(sizes_hw, buckets)]
    small = known & (_measure_fit(sizes_hw, target)[0] > config.max_upscale)
    too_small = small & (config.small == "drop")
    if config.small == "native":
        target = np.where(small[:, None], sizes_hw // config.step_px * config.step_px, target)
        too_small = small & (target == 0).any(axis=1)
    lost = _measure_fit(sizes_hw, np.maximum(target, 1))[1]
    too_long = known & ~too_small & (lost > config.max_crop)
    reasons = {
        "unreadable": ~known,
        f"too small (task.buckets.small={config.small}, task.buckets.max_upscale={config.max_upscale:g})": too_small,
        f"of a shape too far from any bucket (task.buckets.max_crop={config.max_crop:g})": too_long,
    }
    kept = known & ~too_small & ~too_long
    dropped = {reason: rows[chosen] for reason, chosen in reasons.items() if chosen.any()}
    for reason, without in dropped.items():
        names = show_some(collection.table["path"].take(without[:6]).to_pylist())
        log.warning("buckets: %s images are not used: %s: %s", f"{len(without):,}", reason, names)
    sizes, groups = np.unique(target[kept], axis=0, return_inverse=True)
    return Buckets(rows[kept], groups.reshape(-1), sizes, sizes_hw[kept], dropped)


def image_sizes(collection: Collection, rows: np.ndarray, cache: Path) -> np.ndarray:
    """Return the sizes of rows, int64 [N, 2], from the manifest's width and height, else from the files' headers.

    0 for unreadable images. cache: a file in which rank 0 keeps measured sizes.
    Raises UserError (`data.root`) if the index of shards has no sizes; shards are not read.
    """
    from_manifest = collection.stated_sizes()
    sizes = np.zeros((len(rows), 2), dtype=np.int64) if from_manifest is None else from_manifest[rows]

    is_final = from_manifest is not None and collection.is_packed
    unknown = np.flatnonzero((sizes == 0).any(axis=1) & (not is_final))
    measured = measure_rows(collection, rows[unknown], cache, read_upright_size, "image sizes")
    for index, size in zip(unknown, measured):
        sizes[index] = size or 0
    return sizes


def measure_rows(
    collection: Collection, rows: np.ndarray, cache: Path, measure: Callable[[Path], Any], what: str
) -> list[Any]:
    """Return the results of `measure` for the rows' files, on all ranks; rank 0 reads new and changed files.

    None for an unreadable file. Raises UserError (`data.root`) if the rows are in shards.
    """
    if len(rows) and collection.is_packed:
        raise UserError(
            f"data.root: the manifest of the shards in {str(collection.root)!r} lacks {what}; run "
            f"prepare.py job=pack data=image_folder data.root={collection.root} job.output=NEW, and use NEW"
        )

    def measure_one(path: Path) -> Any:
        try:
            return measure(path)
        except (OSError, UnreadableImage) as error:
            log.warning("%s", error)
            return None

    paths = [collection.absolute_path(int(row)) for row in rows]
    every = functools.partial(in_threads, measure_one)
    return distributed.rank_zero_call(lambda: measure_once(paths, every, cache, f"reading {what}"))


def fitted_views(sizes_hw: np.ndarray, config: BucketConfig) -> Views:
    """Return the views of an image in its bucket: `images`, and `fit` (`Fit.conditions`)."""

    def fit(image: Tensor, draw: Draw) -> tuple[Fit, bool]:
        """Return the same random fit for both views, from the sample's key."""
        generator = torch.Generator().manual_seed(rng.hash_counters(draw.key, _FIT_DRAW))
        flip = bool(torch.rand((), generator=generator) < config.flip)

        def draw_corner(slack: np.ndarray) -> np.ndarray:
            return np.array([int(torch.randint(length + 1, (), generator=generator)) for length in slack.tolist()])

        choose_corner = draw_corner if config.crop == "random" else None
        return fit_into(np.array(image.shape[-2:]), sizes_hw[draw.group], choose_corner), flip

    return {
        "images": lambda image, draw: place(image, *fit(image, draw)),
        "fit": lambda image, draw: torch.tensor(fit(image, draw)[0].conditions()),
    }
