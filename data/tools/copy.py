"""Copy a collection or a part of it to another folder, with sidecars and manifest rows, or with reduced images."""

import functools
import io
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from data.collection.collection import Collection
from data.collection.search import find_rows
from data.config import DataConfig
from data.images.open import Unsupported, open_image, read_file
from data.layouts.manifest import find_manifest, read_table, save_manifest, scanned_at
from data.layouts.names import CORRECTIONS, MASK_ENDINGS, PARQUET, POSTS, TABLES, is_mask_name
from data.layouts.sidecars import FIELDS, pair_sidecars
from data.layouts.table import replace_column
from data.layouts.tables import read_parquet
from data.layouts.unused import Unused
from data.layouts.walk import check_root, list_folder
from data.open import load_collection
from data.stream.source import UnreadableImage
from data.tools.tool import Tool, refuse_shards
from utils.config.bounds import Side
from utils.config.schema import PathText, TermsText
from utils.errors import UserError
from utils.io.files import remove_temporary, write_atomically
from utils.io.journal import open_journal
from utils.ranks.processes import map_items
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_WARNED = 20  # warnings about images that are copied unchanged
_PRESENT = "present"
_COPIED = "copied"
_SHRUNK = "shrunk"
_DONE = (_PRESENT, _COPIED, _SHRUNK)
_MEASURED = ("size", "sha256", "width", "height", "mode", "orientation", "transparent")  # of the file itself
_WRITTEN = ("JPEG", "PNG", "WEBP")
_WEBP_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_SMOOTH = {"P": "RGB", "PA": "RGBA", "1": "L"}  # the modes for smooth resizing
_METADATA = ("exif", "icc_profile", "xmp", "dpi", "comment")


class Shrink(NamedTuple):
    """Settings for smaller copies. quality: for JPEG and WebP. max_pixels: larger images are not decoded."""

    longest_px: int | None
    quality: int
    max_pixels: int
    is_webp: bool

    def reduce(self, image: Image.Image) -> bytes | None:
        """Return the file of a smaller image, or of a WebP, with the same metadata; None for the file as it is."""
        name = "WEBP" if self.is_webp else image.format
        longest_px = self.longest_px or max(image.size)
        if max(image.size) <= longest_px and name == image.format:
            return None
        if name not in _WRITTEN or getattr(image, "n_frames", 1) > 1:
            raise Unsupported(f"{image.format}; only one frame of {', '.join(_WRITTEN)} is reduced, or any to WebP")
        is_wide = image.mode.startswith("I")  # grey of 16 bits
        if (is_wide and "transparency" in image.info) or (self.is_webp and image.mode not in _WEBP_MODES):
            raise Unsupported(f"{image.format} of the mode {image.mode}, which a reduced {name} cannot have")
        options = {key: image.info[key] for key in _METADATA if key in image.info}
        if name == "PNG":
            options["pnginfo"] = PngInfo()
            for key, text in image.text.items():
                options["pnginfo"].add_text(key, text)
        else:
            options["quality"] = self.quality
        mode = "RGBA" if "transparency" in image.info else "I" if is_wide else _SMOOTH.get(image.mode, image.mode)
        if mode != image.mode:  # otherwise a JPEG would be decoded at full size
            image = image.convert(mode)
        image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image = image.convert("I;16") if is_wide else image
        content = io.BytesIO()
        image.save(content, format=name, **options)
        return content.getvalue()


class Copy(Tool):
    """Copy the images that terms find (null: all), and what belongs to them; nothing is overwritten.

    find: see data/collection/search.py. to: the target folder. Files that exist there with the same size and
    modification time are skipped, so a killed job continues. longest_px: reduce images with a longer side to it.
    format: webp writes all images as WebP, under new names; a manifest then has all that the collection says about
    them. quality: for JPEG and WebP.
    """

    name: Literal["copy", "downsample"]
    to: PathText
    find: TermsText | None
    longest_px: Side | None
    format: Literal["keep", "webp"]
    quality: Annotated[int, Field(ge=1, le=100)]

    def run(self, data: DataConfig) -> str:
        """Copy. Raises UserError (`job.to`, `data.root`)."""
        root = check_root(data.root)
        target = Path(self.to).expanduser().resolve()
        if target.is_relative_to(root.resolve()) or root.resolve().is_relative_to(target):
            raise UserError(f"job.to: {self.to!r} is inside data.root, or data.root inside it; set another folder")
        collection = load_collection(data)
        is_webp = self.format == "webp"
        shrink = None
        refuse_shards(data.root, collection.table)
        images = self._choose(collection)
        manifest = find_manifest(root)
        others = dict.fromkeys(_sidecars_of(root, images))
        table = None
        if self.longest_px or is_webp:
            shrink = Shrink(self.longest_px, self.quality, data.max_pixels, is_webp)
        if is_webp:
            collection.refuse_faults(*FIELDS)
            _refuse_twins(images)
            others = filter(is_mask_name, others)
            table = collection.table
        elif manifest is not None:
            table = read_parquet(manifest) if manifest.name == PARQUET else read_table(manifest, Unused())
        with open_journal("job.to", target, is_folder=True):
            copies = dict(zip(images, copy_files(root, target, images, shrink)))
            done = [what for _, what in (*copies.values(), *copy_files(root, target, list(others)))]
            if table is not None:
                names = {path: name for path, (name, _) in copies.items()}
                save_manifest(target, _rename(table, names, shrink), None if is_webp else scanned_at(manifest))
                if not is_webp:
                    shutil.copystat(manifest, target / PARQUET)  # so that no copied sidecar is newer
        shrunk = ""
        kept = [(path, what) for path, (_, what) in copies.items() if what not in _DONE]
        for path, why in kept[:_WARNED]:
            log.warning("%s is copied unchanged: %s", path, why)
        if shrink:
            how = "images as WebP" if is_webp else f"images longer than {self.longest_px} pixels"
            shrunk = f"downsampled {done.count(_SHRUNK):,} {how}, {len(kept):,} could not be; "
        count = f"{len(images):,} of {len(collection):,}"
        new = len(done) - done.count(_PRESENT)
        return f"{count} images are in {target}; {shrunk}copied {new:,} of {len(done):,} files"

    def _choose(self, collection: Collection) -> list[str]:
        """Return the paths of the images that are found. Raises UserError (`job.find`)."""
        paths = collection.table["path"]
        if self.find is not None:
            paths = paths.take(find_rows(collection, self.find, "job.find"))
        return paths.to_pylist()


def _rename(table: pa.Table, names: Mapping[str, str], shrink: Shrink | None) -> pa.Table:
    """Return the rows of the copied images, with the paths of the copies, and without what changed files have not."""
    table = table.filter(pc.is_in(table["path"], pa.array(names, pa.string())))
    changed = _MEASURED if shrink else ()
    table = table.drop_columns([name for name in changed if name in table.column_names])
    return replace_column(table, "path", pa.array([names[path] for path in table["path"].to_pylist()], pa.string()))


def _refuse_twins(images: Sequence[str]) -> None:
    """Raise UserError (`job.format`) for two images that would have the same name as WebP."""
    stems: dict[str, str] = {}
    for path in images:
        if (other := stems.setdefault(os.path.splitext(path)[0], path)) != path:
            raise UserError(f"job.format: webp, but {other!r} and {path!r} would become one file; rename one of them")


def copy_files(root: Path, target: Path, files: Sequence[str], shrink: Shrink | None = None) -> list[tuple[str, str]]:
    """Copy files of a collection below `target`, which is locked; return the path of each copy and what was done."""
    remove_temporary({(target / file).parent for file in files})
    copy = functools.partial(_copy_file, root, target, shrink)
    done = map_items(copy, files, functools.partial(_copy_file, root, target, None))
    return list(track(done, len(files), "copying files"))


def _copy_file(root: Path, target: Path, shrink: Shrink | None, path: str) -> tuple[str, str]:
    """Copy a file, reduced if it is too long; return the copy's path and the result, or why it is unchanged.

    Raises UserError (`job.to`) if the copy exists and differs.
    """
    source = root / path
    content = None
    done = _COPIED
    webp = f"{os.path.splitext(path)[0]}.webp" if shrink is not None and shrink.is_webp else path
    for name in filter(lambda name: (target / name).exists(), dict.fromkeys((path, webp))):
        ours = source.stat()
        theirs = (target / name).stat()
        if ours.st_mtime_ns != theirs.st_mtime_ns or (shrink is None and ours.st_size != theirs.st_size):
            raise UserError(f"job.to: {str(target / name)!r} differs from {str(source)!r}; set an empty folder")
        if ours.st_ctime_ns < theirs.st_ctime_ns:  # else the original was changed, with its old time and size
            return name, _PRESENT
    try:
        if shrink is not None:
            with open_image(read_file(source), path, shrink.max_pixels) as image:
                content = shrink.reduce(image)
    except UnreadableImage as error:
        done = error.reason
    if content is None:
        write_atomically(target / path, functools.partial(shutil.copy2, source), flush=False)
        return path, done

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        shutil.copystat(source, temporary)

    write_atomically(target / webp, write)
    return webp, _SHRUNK


def _sidecars_of(root: Path, paths: Sequence[str]) -> Iterator[str]:
    """Yield the sidecars and the mask of each image, and tables that describe it; a file of two images comes twice."""
    parents = {parent for folder in {os.path.dirname(path) for path in paths} for parent in Path(folder, "x").parents}
    for parent in sorted(parents):
        patterns = (*TABLES, *POSTS, "meta_*.json", "meta_*.jsonl", CORRECTIONS) if parent == Path() else TABLES
        yield from (str(file.relative_to(root)) for name in patterns for file in sorted((root / parent).glob(name)))
    images: dict[str, list[str]] = {}
    for path in paths:
        images.setdefault(path[: path.rfind("/") + 1], []).append(os.path.basename(path))
    for folder, here in images.items():
        names = {entry.name for entry in list_folder(root / folder)}
        yield from itertools.chain(*pair_sidecars(folder, here, names)[0].values())
        masks = (os.path.splitext(image)[0] + f"{ending}.png" for image in here for ending in MASK_ENDINGS)
        yield from (folder + mask for mask in masks if mask in names)
