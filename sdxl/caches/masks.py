"""Masks: where in an image the loss counts, from alpha channels or from pictures beside the images.

    masks = find_masks(collection, rows, sizes_hw, config, training=True)
    source = Masked(images or latents, masks, buckets, find_fit)
    source.read(row, key, group)["mask"]      float16 [1, h / 8, w / 8], from 0 to 1

A mask is resized, mirrored and cropped as its image is, and averaged over the pixels of each latent.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from torch.nn import functional

from data.collection.collection import Collection
from data.images.convert import convert, is_transparent, load_upright
from data.images.open import UNLIMITED, open_image, read_file
from data.images.sizes import size_of
from data.layouts.names import CONDITION, is_image_name, masked_stem
from data.layouts.table import show_some
from data.stream.source import Record, Source, UnreadableImage
from sdxl.caches.buckets import Buckets, FindFit, place
from sdxl.caches.latent_cache import STORED
from sdxl.config import STRIDE_PX
from utils.errors import UserError
from utils.io.files import sha256_file
from utils.io.memo import in_threads, measure_once
from utils.io.names import to_nfc
from utils.ranks import distributed
from utils.record.logging import log

MASK = "mask"
_MEASURED = Path("outputs/cache/masks.jsonl")
_FOLDERS = 512  # whose names are kept

Masks = Mapping[int, tuple[str, str, bool]]  # by row: a file, its SHA-256, and whether the mask is its alpha channel


def find_masks(collection: Collection, rows: ndarray, sizes_hw: ndarray, source: str, *, training: bool) -> Masks:
    """Return the masks of rows, but not of concepts without; sizes_hw: of their images [N, 2].

    Raises UserError (`task.mask.source`): a mask that is unreadable, of another size than its image, or an image of the
    collection itself; in training, no mask at all.
    """
    is_alpha = source == "alpha"
    sizes = dict(zip(rows.tolist(), sizes_hw.tolist()))
    concepts = collection.concepts
    ids = collection.concept_ids()

    @functools.lru_cache(_FOLDERS)
    def list_masks(folder: Path) -> dict[str, Path]:
        """Return the masks in a folder by the name of their image without its ending."""
        files = sorted(file for file in folder.glob("*") if CONDITION not in file.name.lower())  # none in a shard
        if source == "beside":
            return {to_nfc(masked_stem(file.name) or ""): file for file in files}
        return {to_nfc(file.stem): file for file in files if is_image_name(file.name)}

    def find_mask(row: int) -> Path | None:
        path = collection.absolute_path(row)
        if is_alpha:
            return path
        other = Path(source, collection.row(row).path.lstrip("/")).expanduser()
        return list_masks((path if source == "beside" else other).parent).get(to_nfc(path.stem))

    def find() -> Masks:
        masked = [row for row in sizes if not concepts or concepts[ids[row]].mask is not False]
        files = {row: file for row in masked if (file := find_mask(row)) and file.is_file()}
        values = measure_once(list(files.values()), functools.partial(in_threads, _measure), _MEASURED, "reading masks")
        images = set() if is_alpha else {os.path.abspath(collection.absolute_path(row)) for row in range(len(ids))}
        masks = {}
        wrong = []
        for (row, file), (size_hw, sha256, has_alpha) in zip(files.items(), values):
            if size_hw != sizes[row] and not is_alpha:
                wrong.append(f"{file} is {size_hw or 'unreadable'}, its image {sizes[row]}")
            elif os.path.abspath(file) in images:
                wrong.append(f"{file} is an image of data.root, too")
            elif has_alpha or not is_alpha:
                masks[row] = os.fspath(file), sha256, is_alpha
        if wrong:
            raise UserError(
                f"task.mask.source: {len(wrong):,} masks do not fit their images (height and width): {show_some(wrong)}"
                "; a mask has the size of its image, and is named x.mask.png or is not below data.root"
            )
        return masks

    masks = distributed.rank_zero_call(find)
    if training and sizes and not masks:
        raise UserError(
            f"task.mask.source: {source}, but none of {len(sizes):,} images has a mask; set alpha, beside (x.mask.png "
            "for x.jpg), or a folder (a/x.png for a/x.jpg), or task.mask=null"
        )
    log.info("task.mask: %s of %s images have a mask; others count as a whole", f"{len(masks):,}", f"{len(sizes):,}")
    return masks


def _measure(path: Path) -> list[Any]:
    """Return height and width (None for an unreadable file), the SHA-256, and whether there is an alpha channel."""
    try:
        with open_image(read_file(path), os.fspath(path), UNLIMITED, header=True) as image:
            return [list(size_of(image)), sha256_file(path), is_transparent(image)]
    except UnreadableImage:
        return [None, "", False]


class Masked(Source):
    """The records of another source with the mask of their image: ones for an image without a mask."""

    def __init__(self, inner: Source, masks: Masks, buckets: Buckets, find_fit: FindFit) -> None:
        self.inner = inner
        self._masks = masks
        self._buckets = buckets
        self._find_fit = find_fit
        self.prefetch, self.readings = inner.prefetch, inner.readings

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return a record with its mask. Raises UnreadableImage for either."""
        record = self.inner.read(row, key, group)
        return record | (self._read_mask(row, key, group) if row in self._masks else self._whole(group))

    def blank(self, group: int) -> Record:
        """Return the blank record with ones."""
        return self.inner.blank(group) | self._whole(group)

    def _whole(self, group: int) -> Record:
        return {MASK: torch.ones(1, *(self._buckets.sizes_hw[group] // STRIDE_PX).tolist(), dtype=STORED)}

    def _read_mask(self, row: int, key: int, group: int) -> Record:
        path, _, is_alpha = self._masks[row]
        with open_image(read_file(path), path, UNLIMITED) as opened:
            image = load_upright(opened)
            pixels = convert(image.convert("RGBA").getchannel("A") if is_alpha else image, 1, (0, 0, 0))
        placed = place(torch.from_numpy(pixels).permute(2, 0, 1), *self._find_fit(row, key, group))
        return {MASK: functional.avg_pool2d(placed.float() / 255, STRIDE_PX).to(STORED)}
