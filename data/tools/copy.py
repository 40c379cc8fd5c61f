"""Copy a collection or a part of it to another folder, with sidecars and manifest rows, or with reduced images."""

import functools
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.collection.search import find_rows
from data.config import DataConfig
from data.images.open import Unsupported, open_image, read_file
from data.layouts.manifest import read_sources, read_table, save_manifest
from data.layouts.names import PARQUET
from data.layouts.scan import list_descriptions
from data.layouts.table import MEASURED, SIDECARS
from data.layouts.tables import read_parquet
from data.layouts.unused import Unused
from data.layouts.walk import check_root, find_manifest
from data.load import load_collection
from data.stream.source import UnreadableImage
from data.tools.config import Copy
from data.tools.tool import refuse_shards
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
_CHANGED = {"size", "sha256", *MEASURED} - {"group", SIDECARS}  # columns that differ in a smaller image
_WRITTEN = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF")
_QUALITY = 95  # of all but PNG
_SMOOTH = {"P": "RGB", "PA": "RGBA", "1": "L"}  # the modes for smooth resizing
_METADATA = ("exif", "icc_profile", "xmp", "dpi", "comment")


def copy_images(job: Copy, data: DataConfig) -> str:
    """Copy. Raises UserError (`job.to`, `job.find`, `data.root`)."""
    root = check_root(data.root)
    target = Path(job.to).expanduser().resolve()
    if target.is_relative_to(root.resolve()) or root.resolve().is_relative_to(target):
        raise UserError(f"job.to: {job.to!r} is inside data.root, or data.root inside it; set another folder")
    collection = load_collection(data)
    refuse_shards(data.root, collection.table)
    paths = collection.table["path"]
    if job.find is not None:
        paths = paths.take(find_rows(collection, job.find, "job.find"))
    images = paths.to_pylist()
    others = list_descriptions(root, images)
    copy = functools.partial(_copy_file, root, target)
    shrink = functools.partial(copy, longest_px=job.longest_px, max_pixels=data.max_pixels)
    with open_journal("job.to", target, is_folder=True):
        remove_temporary({(target / file).parent for file in (*images, *others)})
        done = dict(zip(images, _copy_all(shrink, images, copy)))
        beside = list(_copy_all(copy, others, copy))
        if (manifest := find_manifest(root)) is not None:
            _copy_rows(manifest, target, images, is_changed=job.longest_px is not None)
    shrunk = ""
    kept = {path: what for path, what in done.items() if what not in (_PRESENT, _COPIED, _SHRUNK)}
    for path in list(kept)[:_WARNED]:
        log.warning("%s is copied unchanged: %s", path, kept[path])
    results = [*done.values(), *beside]
    if job.longest_px:
        count = results.count(_SHRUNK)
        shrunk = f"downsampled {count:,} images longer than {job.longest_px} pixels, {len(kept):,} could not be; "
    new = len(results) - results.count(_PRESENT)
    found = f"{len(images):,} of {len(collection):,} images are in {target}"
    return f"{found}; {shrunk}copied {new:,} of {len(results):,} files"


def _copy_rows(manifest: Path, target: Path, images: Sequence[str], *, is_changed: bool) -> None:
    """Write the rows of the copied images. is_changed: without the columns that differ in smaller images."""
    table = read_parquet(manifest) if manifest.name == PARQUET else read_table(manifest, Unused())
    table = table.filter(pc.is_in(table["path"], pa.array(images, pa.string())))
    if is_changed:
        table = table.drop_columns([name for name in table.column_names if name in _CHANGED])
    save_manifest(target, table, read_sources(manifest))


def _copy_all(copy: functools.partial, files: Sequence[str], fallback: functools.partial) -> Iterable[str]:
    """Copy files in processes; return what was done with each. fallback: for a file that crashes its process."""
    return track(map_items(copy, files, fallback), len(files), "copying files")


def _copy_file(root: Path, target: Path, path: str, longest_px: int | None = None, max_pixels: int = 0) -> str:
    """Copy a file, reduced if it is too long; return the result, or why it is unchanged.

    Raises UserError (`job.to`) if the copy exists and differs.
    """
    source = root / path
    copy = target / path
    content = None
    done = _COPIED
    if copy.exists():
        ours = source.stat()
        theirs = copy.stat()
        if ours.st_mtime_ns != theirs.st_mtime_ns or (longest_px is None and ours.st_size != theirs.st_size):
            raise UserError(f"job.to: {str(copy)!r} differs from {str(source)!r}; set an empty folder")
        if ours.st_ctime_ns < theirs.st_ctime_ns:  # else the original was changed, with its old time and size
            return _PRESENT
    try:
        if longest_px is not None:
            with open_image(read_file(source), path, max_pixels) as image:
                content = reduce(image, longest_px)
    except UnreadableImage as error:
        done = error.reason
    if content is None:
        write_atomically(copy, functools.partial(shutil.copy2, source), flush=False)
        return done

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        shutil.copystat(source, temporary)

    write_atomically(copy, write)
    return _SHRUNK


def reduce(image: Image.Image, longest_px: int) -> bytes | None:
    """Return the file of a smaller image, with the same format and metadata; None for one that is small enough.

    Raises UnreadableImage for one that cannot be reduced.
    """
    if max(image.size) <= longest_px:
        return None
    is_wide = image.mode.startswith("I")  # grey of 16 bits
    is_clear = "transparency" in image.info
    if image.format not in _WRITTEN or getattr(image, "n_frames", 1) > 1 or (is_wide and is_clear):
        raise Unsupported(f"{image.format} {image.mode}; only one frame of {', '.join(_WRITTEN)} is reduced")
    options = {key: image.info[key] for key in _METADATA if key in image.info}
    if image.format == "PNG":
        options["pnginfo"] = PngInfo()
        for key, text in image.text.items():
            options["pnginfo"].add_text(key, text)
    else:
        options["quality"] = _QUALITY
    name = image.format
    mode = "RGBA" if is_clear else _SMOOTH.get(image.mode, image.mode)
    if mode != image.mode:  # otherwise a JPEG would be decoded at full size
        image = image.convert(mode)
    gap = None if is_wide else 3.0  # Pillow cannot halve 16 bits first
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS, reducing_gap=gap)
    content = io.BytesIO()
    image.save(content, format=name, **options)
    return content.getvalue()
