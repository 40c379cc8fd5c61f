"""Buckets: the training sizes for images of many shapes, and how an image is fitted into one.

    sizes_hw = image_sizes(collection, rows, cache)
    buckets = make_buckets(collection, rows, sizes_hw, config)
    fit = fit_into(size_hw, bucket_hw, choose_corner)
    pixels = place(image, fit, flip=False)

Sizes are (height, width) in pixels, after EXIF rotation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy import ndarray
from torch import Tensor

from data.collection.collection import Collection
from data.images.resize import on_pixels, resize
from data.layouts.table import show_some
from data.stream.order import Draw, Views
from sdxl.config import BucketConfig
from utils import rng
from utils.io.files import Json
from utils.record.logging import log

_FIT_DRAW = 3  # counter for a sample's key; the loader uses 1 and 2
_TURNS = 9  # of `choose_sizes`; four were enough on drawn collections
_MORE_CROP = 0.1  # no image goes to an area that crops this share more of it than another area does


def assign(sizes_hw: ndarray, buckets_hw: ndarray) -> ndarray:
    """Return the bucket with the nearest log(height / width) for each size: int64 [N]."""
    ratios = _log_ratios(buckets_hw)
    order = np.argsort(ratios, kind="stable")
    between = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(between, _log_ratios(sizes_hw))]


def choose_sizes(sizes_hw: ndarray, image_hw: ndarray, count: int) -> ndarray:
    """Return `count` of the sizes [K, 2] that crop images [N, 2] little, and log the mean share that they crop.

    An image of log ratio x in a bucket of log ratio r loses 1 - exp(-|x - r|) of its area. Sizes are chosen one after
    another, and then again in turns: each is the best beside the others (k-medoids).
    """
    shapes, images = np.unique(_log_ratios(image_hw), return_counts=True)
    lost = -np.expm1(-np.abs(shapes[:, None] - _log_ratios(sizes_hw))) * images[:, None]
    chosen = []
    for _ in range(_TURNS * count):
        chosen = chosen[len(chosen) == count :]
        others = lost[:, chosen].min(axis=1, initial=np.inf)
        chosen.append(int(np.minimum(lost, others[:, None]).sum(axis=0).argmin()))
    cropped = [lost[:, sizes].min(axis=1).sum() / max(images.sum(), 1) for sizes in (slice(None), chosen)]
    log.info("task.buckets.fit: the mean share cropped of an image was %.3f and is %.3f", *cropped)
    return sizes_hw[sorted(set(chosen))]


def _log_ratios(sizes_hw: ndarray) -> ndarray:
    return np.log(sizes_hw[:, 0] / sizes_hw[:, 1])


class BucketFit(NamedTuple):
    """How images fill their buckets: resize, optional flip, crop; each field is int64 [..., 2].

    crop_top_left: in the resized and flipped image, so it matches what the network sees. (If the crop came before the
    flip, its left edge would have to be flipped, too: huggingface/diffusers#6547.)
    """

    original_hw: ndarray
    resized_hw: ndarray
    crop_top_left: ndarray
    target_hw: ndarray

    def conditions(self) -> ndarray:
        """Return the size conditioning of SDXL (time_ids), [..., 6]."""
        return np.concatenate([self.original_hw, self.crop_top_left, self.target_hw], axis=-1)


# From row, key and group to the fit, and whether the image is mirrored.
FindFit = Callable[[int, int, int], tuple[BucketFit, bool]]
CornerRule = Callable[[ndarray], ndarray]  # from the excess sizes of images to the corners of their crops


def fit_into(size_hw: ndarray, bucket_hw: ndarray, choose_corner: CornerRule | None = None) -> BucketFit:
    """Return how images fill buckets, int64 [..., 2], at the smallest size that covers the bucket.

    choose_corner: None for centre crops.
    """
    zoom = (bucket_hw / size_hw).max(axis=-1, keepdims=True)
    resized_hw = np.maximum(bucket_hw, np.round(size_hw * zoom).astype(np.int64))
    slack = resized_hw - bucket_hw
    corner = slack // 2 if choose_corner is None else choose_corner(slack)
    return BucketFit(*np.broadcast_arrays(size_hw, resized_hw, corner, bucket_hw))


def place(image: Tensor, fit: BucketFit, flip: bool) -> Tensor:
    """Resize, flip and crop an image [C, H, W] into its bucket: [C, h, w]."""
    image = on_pixels(image, resize, fit.resized_hw.tolist(), "bicubic")
    top, left = fit.crop_top_left.tolist()
    height, width = fit.target_hw.tolist()
    return (image.flip(-1) if flip else image)[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Buckets:
    """The buckets of a collection's rows, a sample for each row and bucket; with assign=all, a row has several.

    rows: the row of each sample, int64 [N], ascending. groups: the bucket of each sample, an index into `sizes_hw`
    [K, 2]; ascending within a row. image_hw [N, 2]: the image sizes. dropped: rows without a bucket, by reason.
    """

    config: BucketConfig

    rows: ndarray
    groups: ndarray
    sizes_hw: ndarray
    image_hw: ndarray
    dropped: dict[str, ndarray]

    def describe(self) -> str:
        """Describe the buckets and the cropped area in one line."""
        dropped = "".join(f"; {len(rows):,} dropped: {reason}" for reason, rows in self.dropped.items() if len(rows))
        if len(self.rows) == 0:
            return f"no image has a bucket{dropped}"
        zoom, lost = _measure_fit(self.image_hw, self.sizes_hw[self.groups])
        areas = self.sizes_hw.prod(axis=1)
        images = len(np.unique(self.rows))
        line = f"{len(self.sizes_hw)} buckets of {areas.min():,} to {areas.max():,} px for {images:,} images"
        if images < len(self.rows):
            line += f", each in several: {len(self.rows):,} samples an epoch"
        line += f"; cropped {lost.mean():.1%} of the area in the mean, {lost.max():.1%} at worst"
        line += f"; {np.count_nonzero(zoom > 1):,} enlarged, at most {max(zoom.max(), 1):.1f} times"
        return line + dropped

    def count(self) -> list[list[int]]:
        """Return height, width and number of images of each bucket."""
        return np.column_stack([self.sizes_hw, np.bincount(self.groups, minlength=len(self.sizes_hw))]).tolist()

    def list_images(self, collection: Collection) -> list[Json]:
        """Return a row for each sample, and for each image without a bucket: its size, its bucket and how it fits."""
        target_hw = self.sizes_hw[self.groups]
        zoom, lost = _measure_fit(self.image_hw, target_hw)
        paths = collection.table["path"]
        columns = {"path": paths.take(self.rows), "height": self.image_hw[:, 0], "width": self.image_hw[:, 1]}
        columns |= {"bucket_height": target_hw[:, 0], "bucket_width": target_hw[:, 1]}
        columns |= {"enlarged": zoom.round(3), "cropped": lost.round(3)}
        rows = pa.table(columns).to_pylist()
        for reason, dropped in self.dropped.items():
            rows += [{"path": path, "dropped": reason} for path in paths.take(dropped).to_pylist()]
        return rows

    def number_of(self, row: int, group: int) -> int:
        """Return the index of the sample of a row in a bucket."""
        first, end = np.searchsorted(self.rows, (row, row + 1))
        return int(first + np.searchsorted(self.groups[first:end], group))

    def draw_fit(self, row: int, key: int, group: int) -> tuple[BucketFit, bool]:
        """Return how the image of a sample fills its bucket, and whether it is mirrored, from the sample's key."""
        generator = torch.Generator().manual_seed(rng.hash_counters(key, _FIT_DRAW))
        flip = bool(torch.rand((), generator=generator) < self.config.flip)

        def draw_corner(slack: ndarray) -> ndarray:
            return np.array([int(torch.randint(length + 1, (), generator=generator)) for length in slack.tolist()])

        choose_corner = draw_corner if self.config.crop == "random" else None
        return fit_into(self.image_hw[self.number_of(row, group)], self.sizes_hw[group], choose_corner), flip


def _measure_fit(image_hw: ndarray, target_hw: ndarray) -> tuple[ndarray, ndarray]:
    """Return the enlargement of each image [..., 2], and the cropped share of its area, float64 [...]."""
    zoom = (target_hw / image_hw).max(axis=-1)
    return zoom, 1 - (target_hw / (image_hw * zoom[..., None])).prod(axis=-1)


def _choose(image_hw: ndarray, areas: Sequence[ndarray], config: BucketConfig) -> ndarray:
    """Return the bucket of each image [N, 2], int64 [1, N, 2], or with assign=all one of each area, [areas, N, 2].

    The ratio decides within an area, and the image's size between areas; orientation decides nothing.
    """
    nearest = np.stack([sizes[assign(image_hw, sizes)] for sizes in areas])
    if config.assign == "all" or len(areas) == 1:
        return nearest
    zoom, lost = _measure_fit(image_hw, nearest)
    crops_more = (lost > config.max_crop) | (lost > lost.min(axis=0) + _MORE_CROP)
    enlarges = (zoom > 1) & (config.assign == "no_upscale")
    order = np.lexsort((np.abs(np.log(zoom)), enlarges, crops_more), axis=0)
    return np.take_along_axis(nearest, order[:1, :, None], axis=0)


def make_buckets(collection: Collection, rows: ndarray, sizes_hw: ndarray, config: BucketConfig) -> Buckets:
    """Assign rows with sizes [N, 2] (0 if unknown) to buckets; warn of rows without one."""
    target = _choose(np.maximum(sizes_hw, 1), config.sizes(), config)
    rows = np.tile(rows, len(target))
    sizes_hw = np.tile(sizes_hw, (len(target), 1))
    target = target.reshape(-1, 2)
    known = (sizes_hw > 0).all(axis=1)
    sizes_hw = np.maximum(sizes_hw, 1)
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
    buckets, groups = np.unique(target[kept], axis=0, return_inverse=True)
    # An image is in a bucket once, even if two areas have this bucket.
    _, firsts = np.unique(rows[kept] * len(buckets) + groups.reshape(-1), return_index=True)
    dropped = {}
    for reason, chosen in reasons.items():
        if not len(without := np.setdiff1d(rows[chosen], rows[kept])):
            continue
        dropped[reason] = without
        names = show_some(collection.table["path"].take(without[:6]).to_pylist())
        log.warning("buckets: %s images are not used: %s: %s", f"{len(without):,}", reason, names)
    return Buckets(config, rows[kept][firsts], groups.reshape(-1)[firsts], buckets, sizes_hw[kept][firsts], dropped)


def fitted_views(find_fit: FindFit) -> Views:
    """Return the views of an image in its bucket: `images`, and `fit`, the conditions of the same `BucketFit`."""

    def fit(draw: Draw) -> tuple[BucketFit, bool]:
        return find_fit(draw.index, draw.key, draw.group)

    return {
        "images": lambda image, draw: place(image, *fit(draw)),
        "fit": lambda image, draw: torch.tensor(fit(draw)[0].conditions()),
    }
