"""job=cache: what the caches hold and who uses it; removes what nothing uses; compares smaller forms of images."""

import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from safetensors import deserialize

from data.collection.choose import spread
from data.collection.collection import Collection
from data.config import DataConfig
from data.images.bytes import image_key, open_contents
from data.images.caches import GIB, HEAD
from data.images.record_store import USES, Store, Use
from data.layouts.remote import is_remote
from data.open import load_collection, open_images
from data.stream.source import IMAGE, UnreadableImage
from data.tools.tool import Tool, save_report
from utils.config.bounds import DurationOrZero
from utils.config.schema import PathText
from utils.io.files import output_errors
from utils.io.safe_text import Lines
from utils.record.figures import show_rows
from utils.record.logging import get_logger
from utils.record.report import TableRow

log = get_logger(__name__)

_DAY_SEC = 86_400
_SAMPLE = 100  # records whose shapes are read, and images to compare
_RECORD = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.\d+\.tmp").fullmatch  # or what a killed process left


class Cache(Tool):
    """List the caches in `folder`; with `apply`, remove the records that no run has used for `unused_days`.

    compare: measure the size and the error of decoded images in these formats, at `quality`.
    """

    name: Literal["cache"]
    folder: PathText
    unused_days: DurationOrZero
    compare: list[Literal["jpeg", "webp"]]
    quality: Annotated[int, Field(ge=1, le=100)]
    apply: bool
    report: PathText

    def run(self, data: DataConfig) -> str:
        """List, compare and remove. Raises UserError (`data.root`, `job`)."""
        root = data.root if is_remote(data.root) else str(Path(data.root).expanduser().absolute())
        folder, tables = Path(self.folder), {"stores": [], "uses": [], "formats": list(self._compare(data))}
        unused, paths = [], {*(folder.iterdir() if folder.is_dir() else ()), Path(data.cache.folder)}
        for path in sorted(path for path in paths if path.exists()):
            unused += self._list_store(path, root, tables)
        for rows in filter(None, (tables["stores"], tables["formats"])):
            log.info("%s", Lines(show_rows(rows)))
        figures = {"unused files": len(unused), "unused GiB": sum(file.stat().st_size for file in unused) / GIB}
        with output_errors("job.folder", folder):
            for file in unused if self.apply else ():
                file.unlink(missing_ok=True)
                (file.parents[1] / "used").unlink(missing_ok=True)  # the size of a `LimitedStore`, which counts again
        page = save_report(Path(self.report) / self.name, self.folder, figures, tables, {})
        done = "removed" if self.apply else "job.apply=true removes them"
        return f"{len(unused):,} files not used for {self.unused_days:g} days: {done}; {page}"

    def _list_store(self, path: Path, root: str, tables: dict[str, list[TableRow]]) -> list[Path]:
        """Add a store, or another cache, and its uses to the tables; return the files that nothing uses."""
        store, since = Store(path), time.time() - self.unused_days * _DAY_SEC
        # Only a store has uses: folders of users also have names of two digits.
        records = [file for file in path.glob("[0-9a-f][0-9a-f]/*") if (path / USES).is_dir() and _RECORD(file.name)]
        files = records or [file for file in (path, *path.rglob("*")) if file.is_file()]
        uses = store.uses()
        sizes, written = np.array([(file.stat().st_size, file.stat().st_mtime) for file in files] or [(0, 0)]).T
        names = np.array([file.name for file in files] or [""], np.bytes_)
        ours, used = np.zeros((2, len(names)), bool)
        for use in uses.values():
            has = np.isin(names, _find_keys(use))
            ours |= has & (use.about["root"] == root)
            used |= has & (use.at > since)
            about = {"root": use.about["root"], "recipe": json.dumps(use.about["recipe"])}
            tables["uses"].append({"store": str(path), "records": int(has.sum()), "used": _date(use.at), **about})
        contents = (store.get(file.name) for file in records[:: len(records) // _SAMPLE + 1])
        shapes = {_describe(content) for content in contents if content is not None}
        tables["stores"].append({
            "store": str(path), "GiB": float(sizes.sum()) / GIB, "records": len(files),
            "of data.root": float(sizes[ours].sum() / sizes.sum()) if uses else None,
            "used": _date(max([*written, *(use.at for use in uses.values())])),
            "recipes": len({str(use.about["recipe"]) for use in uses.values()}), "shapes": "; ".join(sorted(shapes)),
        })  # fmt: skip
        unused = np.flatnonzero(~used & (written < since)) if records else ()
        return [files[number] for number in unused] + [file for file, use in uses.items() if use.at < since]

    def _compare(self, data: DataConfig) -> Iterator[TableRow]:
        """Yield the size and the error of some images of `data.root` in each format."""
        if not self.compare:
            return
        collection, pictures = load_collection(data), []
        source = open_images(collection, data, {"channels": 3})
        for row in spread(np.flatnonzero(collection.weights()), _SAMPLE).tolist():
            with suppress(UnreadableImage):
                pictures.append(source.read(row)[IMAGE].permute(1, 2, 0).numpy())
        decoded = sum(picture.nbytes for picture in pictures)
        for form in self.compare:
            files = [io.BytesIO() for _ in pictures]
            for picture, file in zip(pictures, files):
                Image.fromarray(picture).save(file, form, quality=self.quality)
            started = time.perf_counter()
            again = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            seconds = time.perf_counter() - started
            errors = sum(np.square(one - np.float64(other)).sum() for one, other in zip(again, pictures))
            size = sum(len(file.getvalue()) for file in files)
            yield {
                "format": form, "quality": self.quality, "images": len(files), "of decoded size": size / decoded,
                "GiB of data.root": size / max(1, len(files)) * len(collection) / GIB,
                "error (RMS levels)": (errors / decoded) ** 0.5, "ms to decode": 1000 * seconds / len(files),
            }  # fmt: skip


def _find_keys(use: Use) -> np.ndarray:
    """Return the keys of a use, bytes [N]; keys of images follow from their files, while the index exists."""
    if "index" not in use.about or not Path(use.about["index"]).is_file():
        return use.keys
    contents = open_contents(collection := Collection(use.about["root"], Path(use.about["index"])))
    keys = (image_key(contents, row, use.about["recipe"]) for row in range(len(collection)))
    return np.array([key for key in keys if key is not None], np.bytes_)


def _describe(content: np.ndarray) -> str:
    """Return the shapes and dtypes of a record: decoded pixels, or tensors in a safetensors file."""
    shape = HEAD.unpack(content[: HEAD.size].tobytes())
    if HEAD.size + np.prod(shape, dtype=np.float64) == len(content):
        return f"{list(shape)} uint8"
    return ", ".join(f"{name} {entry['shape']} {entry['dtype']}" for name, entry in deserialize(content.tobytes()))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
