"""Copy a collection or a part of it to another folder, with sidecars and manifest rows, or with reduced images."""

import functools
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from data.config import DataConfig
from data.images.image_formats import Unsupported, open_image, read_file
from data.images.pixels import convert
from data.layouts.folders import MASK_ENDINGS, POSTS, check_root, list_folder
from data.layouts.huggingface import TABLES
from data.layouts.manifest import PARQUET, find_manifest, read_parquet, read_table
from data.layouts.sidecars import list_sidecars
from data.layouts.spelling import parse_tag
from data.layouts.unused import Unused
from data.open import load_collection
from data.stream.source import UnreadableImage
from data.tools.exclude import Rules, find_failing
from data.tools.tool import Tool
from utils.config.bounds import Side
from utils.config.schema import PathText
from utils.errors import UserError
from utils.io.files import remove_temporary, write_atomically
from utils.io.journal import open_journal
from utils.ranks.processes import map_items
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_WARNED = 20  # warnings about images that are copied unchanged
_PRESENT, _COPIED, _SHRUNK = "present", "copied", "shrunk"
_WRITTEN = ("JPEG", "PNG", "WEBP")
_SMOOTH = {"P": "RGB", "PA": "RGBA", "1": "L"}  # the modes for smooth resizing
_METADATA = ("exif", "icc_profile", "xmp", "dpi", "comment")


class Shrink(NamedTuple):
    """Settings for smaller copies. quality: for JPEG and WebP. max_pixels: larger images are not decoded."""

    longest_px: int
    quality: int
    max_pixels: int

    def reduce(self, image: Image.Image) -> bytes | None:
        """Return the file of a smaller image with the same metadata; None if no side is too long."""
        if max(image.size) <= self.longest_px:
            return None
        name = image.format
        if name not in _WRITTEN or getattr(image, "n_frames", 1) > 1:
            raise Unsupported(f"{name}; only {', '.join(_WRITTEN)} of one frame are reduced")
        options = {key: image.info[key] for key in _METADATA if key in image.info}
        if name == "PNG":
            options["pnginfo"] = PngInfo()
            for key, text in image.text.items():
                options["pnginfo"].add_text(key, text)
        else:
            options["quality"] = self.quality
        if image.mode.startswith("I") and "transparency" in image.info:  # 16 bits; Pillow has none with alpha
            grey, clear = convert(image, 1, None), np.asarray(image) == image.info["transparency"]
            image = Image.fromarray(np.dstack([grey, np.where(clear, 0, 255).astype(np.uint8)]))
        is_wide = image.mode.startswith("I")  # grey of 16 bits
        mode = "RGBA" if "transparency" in image.info else "I" if is_wide else _SMOOTH.get(image.mode, image.mode)
        if mode != image.mode:  # otherwise a JPEG would be decoded at full size
            image = image.convert(mode)
        image.thumbnail((self.longest_px, self.longest_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image, content = image.convert("I;16") if is_wide else image, io.BytesIO()
        image.save(content, format=name, **options)
        return content.getvalue()


class Copy(Tool, Rules):
    """Copy the images that have all the tags and break no rule, and what belongs to them; nothing is overwritten.

    to: the target folder. Files that exist there with the same size and modification time are skipped, so a killed job
    continues. longest_px: reduce images with a longer side to it, which no manifest then describes; None: copy all as
    they are. quality: for JPEG and WebP.
    """

    name: Literal["copy", "downsample"]
    to: PathText
    tags: list[str]
    longest_px: Side | None
    quality: Annotated[int, Field(ge=1, le=100)]

    def run(self, data: DataConfig) -> str:
        """Copy. Raises UserError (`job.to`, `data.root`)."""
        root, target = check_root(data.root), Path(self.to).expanduser().resolve()
        if target.is_relative_to(root.resolve()) or root.resolve().is_relative_to(target):
            raise UserError(f"job.to: {self.to!r} is inside data.root, or data.root inside it; set another folder")
        collection = load_collection(data)
        paths = collection.table["path"].to_pylist()
        chosen = set(paths).difference(find_failing(collection, self, data))
        if needed := {parse_tag(tag).name for tag in self.tags}:
            collection.refuse_faults("tags")
        for path, tags in zip(paths, collection.table["tags"].to_pylist() if needed else ()):
            if not needed <= {parse_tag(tag).name for tag in tags}:
                chosen.discard(path)
        images, shrunk = sorted(chosen), ""
        others = list(dict.fromkeys(_sidecars_of(root, images)))
        with open_journal("job.to", target, is_folder=True):
            shrink = self.longest_px and Shrink(self.longest_px, self.quality, data.max_pixels)
            done = copy_files(root, target, images, shrink) + copy_files(root, target, others)
            if (manifest := find_manifest(root)) is not None and not shrink:
                table = read_parquet(manifest) if manifest.name == PARQUET else read_table(manifest, Unused())
                rows = table.filter(pa.array([path in chosen for path in table["path"].to_pylist()]))
                write_atomically(target / PARQUET, lambda file: pq.write_table(rows, file, compression="zstd"))
        if shrink:
            unfit = [(path, what) for path, what in zip(images, done) if what not in (_PRESENT, _COPIED, _SHRUNK)]
            for path, why in unfit[:_WARNED]:
                log.warning("%s is copied unchanged: %s", path, why)
            longer = f"images longer than {self.longest_px} pixels, {len(unfit):,} could not be"
            shrunk = f"downsampled {done.count(_SHRUNK):,} {longer}; "
        return (
            f"{len(chosen):,} of {len(paths):,} images are in {target}; {shrunk}copied {done.count(_COPIED):,} of "
            f"{len(done):,} files"
        )


def copy_files(root: Path, target: Path, files: Sequence[str], shrink: Shrink | None = None) -> list[str]:
    """Copy files of a collection to the same paths below `target`, which is locked; return the result for each."""
    remove_temporary({(target / file).parent for file in files})
    copy = functools.partial(_copy_file, root, target, shrink)
    done = map_items(copy, files, functools.partial(_copy_file, root, target, None))
    return list(track(done, len(files), "copying files"))


def _copy_file(root: Path, target: Path, shrink: Shrink | None, path: str) -> str:
    """Copy a file, reduced if it is too long; return the result, or the reason for an unchanged copy.

    Raises UserError (`job.to`) if the copy exists and differs.
    """
    source, copy, done = root / path, target / path, _COPIED
    if copy.exists():
        ours, theirs = source.stat(), copy.stat()
        if ours.st_mtime_ns != theirs.st_mtime_ns or (shrink is None and ours.st_size != theirs.st_size):
            raise UserError(f"job.to: {str(copy)!r} differs from {str(source)!r}; set an empty folder")
        if ours.st_ctime_ns < theirs.st_ctime_ns:  # else the original was changed, with its old time and size
            return _PRESENT
    reduced = None
    try:
        if shrink is not None:
            reduced = open_image(read_file(source), path, shrink.max_pixels, shrink.reduce)
    except UnreadableImage as error:
        done = error.reason
    if reduced is None:
        write_atomically(copy, functools.partial(shutil.copy2, source), flush=False)
        return done

    def write(temporary: Path) -> None:
        temporary.write_bytes(reduced)
        shutil.copystat(source, temporary)

    write_atomically(copy, write)
    return _SHRUNK


def _sidecars_of(root: Path, paths: Sequence[str]) -> Iterator[str]:
    """Yield the sidecars and the mask of each image, and tables that describe it; a file of two images comes twice."""
    names: dict[str, set[str]] = {}
    parents = {parent for folder in {os.path.dirname(path) for path in paths} for parent in Path(folder, "x").parents}
    for parent in sorted(parents):
        patterns = (*TABLES, *POSTS, "meta_*.json", "meta_*.jsonl") if parent == Path() else TABLES
        yield from (str(file.relative_to(root)) for name in patterns for file in sorted((root / parent).glob(name)))
    for path in paths:
        folder, stem = path[: path.rfind("/") + 1], os.path.splitext(path)[0]
        if folder not in names:
            names[folder] = {entry.name for entry in list_folder(root / folder)}
        yield from list_sidecars(path, names)
        masks = (f"{stem}{ending}.png" for ending in MASK_ENDINGS)
        yield from (mask for mask in masks if os.path.basename(mask) in names[folder])
