"""The collections that the page knows, and their images: `/image/COLLECTION/FINGERPRINT/ROW?px=256`."""

import io
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import HTTPException, Query, Response
from nicegui import app
from PIL import Image
from pydantic import ValidationError

from data.collection.collection import Collection
from data.collection.concepts import find_folders
from data.collection.index import CACHE, index_collection
from data.config import DataConfig
from data.images.bytes import open_contents
from data.images.convert import convert, is_transparent, load_upright
from data.images.open import open_image
from data.layouts.names import is_remote
from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.formats.background import DEFAULT, background_rgb
from utils.io.files import canonical_json, read_json, sha256_text
from utils.io.memo import own_cache
from utils.record.run_index import RunIndex, find_runs, is_inside, is_own_run
from utils.record.run_reader import RunReader

_LARGEST_PX = 4096  # the side of one
_QUALITY = 92  # of its JPEG
# Shown in the place of an image. The answer is 200: a 404 would be an error in the browser's console.
_UNREADABLE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96"><text x="48" y="52" text-anchor="middle" '
    'font-family="sans-serif" font-size="13" fill="#868e96">unreadable</text></svg>'
)


class Shelf:
    """The collections that runs were trained on, and the one that the user names. To open one may take long.

    configs: their settings by name, the user's first; roots are absolute. `of_runs` looks for more.
    """

    def __init__(self, runs: RunIndex, data: DataConfig | None) -> None:
        self.runs = runs
        self._lock = Lock()
        self.configs = dict[str, DataConfig]()
        self._open = dict[tuple[str, bool], Collection]()  # by name, and whether it is corrected
        self._shown = dict[tuple[str, str], Collection]()  # by name and fingerprint
        if data is not None:
            self.add(data)

    def add(self, config: DataConfig) -> str:
        """Add a collection, and return its name."""
        if not is_remote(config.root):
            config = config.changed({"root": str(Path(config.root).resolve())})
        keys = config.model_dump(mode="json", include={"root", *config.index_settings()})
        name = sha256_text(canonical_json(keys))[:12]
        self.configs[name] = config
        return name

    def of_run(self, run: Path) -> str | None:
        """Return the name of the collection of a run, or of compared taggers; None if its settings say none."""
        try:
            config = RunReader(run).config if is_own_run(run) else read_json(run / "arena.json")
            return self.add(DataConfig.model_validate(config.get("data")))
        except (OSError, UserError, ValidationError):  # deleted meanwhile, damaged, or without a collection
            return None

    def of_runs(self) -> dict[Path, str | None]:
        """Return all runs, each with the name of its collection, as `of_run` does."""
        return {run: self.of_run(run) for run in find_runs(self.runs.roots)}

    def config(self, name: str) -> DataConfig:
        """Return the settings of a collection. Raises HTTPException 404 for an unknown name."""
        if name not in self.configs:
            self.of_runs()  # of runs since then
        if name not in self.configs:
            raise HTTPException(404, "no such collection")
        return self.configs[name]

    def open(self, name: str, *, again: bool = False, corrected: bool = True) -> Collection:
        """Return a collection; again: look for changes. Raises UserError (`data.root`), HTTPException 404."""
        config = self.config(name)
        with self._lock:
            opened = self._open.get((name, corrected))
            if again or opened is None:
                settings = config.index_settings() | {"corrections": config.corrections and corrected}
                arrow = index_collection(config.root, cache=CACHE, **settings)
                if opened is None or opened.arrow != arrow:
                    opened = Collection(config.root, arrow)
                    self._open[name, corrected] = opened
                    self._shown[name, opened.fingerprint] = opened
            return opened

    def find(self, name: str, fingerprint: str) -> Collection:
        """Return a collection as it was when a page showed it: a later correction does not end the addresses."""
        return self._shown.get((name, fingerprint)) or self.open(name)

    def read(self, name: str, collection: Collection, row: int) -> bytes:
        """Return the bytes of an image's file. Raises UnreadableImage, also for links out of the collection."""
        contents = open_contents(collection)
        config = self.config(name)
        if (file := contents.file_of(row)) is not None:
            roots = [config.root, *find_folders(config.root, config.concepts or ()), own_cache(CACHE)]
            if not any(is_inside(Path(file.path), Path(root).resolve()) for root in roots):
                raise UnreadableImage(contents.name_of(row), "a link out of the collection", file.path)
        return contents.read(row)


def image_address(name: str, collection: Collection, row: int, px: int = 256) -> str:
    """Return the address of an image, reduced to `px`."""
    return f"/image/{name}/{collection.fingerprint}/{row}?px={px}"


def rows_of_paths(collection: Collection, paths: Sequence[str]) -> np.ndarray:
    """Return the row of each path, int64 [n]; -1 for others."""
    rows = pc.index_in(pa.array(paths, pa.string()), value_set=collection.table["path"].combine_chunks())
    return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def reduce_image(content: bytes, name: str, max_pixels: int, px: int) -> tuple[bytes, str]:
    """Return an image with a longer side of at most `px`, and its format: a JPEG, or WebP where it is transparent.

    Raises UnreadableImage.
    """
    with open_image(content, name, max_pixels) as image:
        image.draft(None, (px, px))  # a JPEG is decoded at 1/2, 1/4 or 1/8 scale if that suffices
        picture = load_upright(image)
        keeps = is_transparent(picture) and not picture.mode.startswith("I")
        picture = picture.convert("RGBA") if keeps else Image.fromarray(convert(picture, 3, background_rgb(DEFAULT)))
        picture.thumbnail((px, px))
        kind = "webp" if keeps else "jpeg"
        picture.save(file := io.BytesIO(), kind, quality=_QUALITY, subsampling=0)
        return file.getvalue(), kind


def add_route(shelf: Shelf) -> None:
    """Add the route of images."""

    @app.get("/image/{name}/{fingerprint}/{row}")
    def image(
        name: str, fingerprint: str, row: int, px: Annotated[int, Query(ge=16, le=_LARGEST_PX)] = 256
    ) -> Response:
        headers = {"Cache-Control": "private, max-age=600"}
        try:
            collection = shelf.find(name, fingerprint)
            if collection.fingerprint != fingerprint or not 0 <= row < len(collection):
                raise HTTPException(404, "no such image; the collection may have changed: load the page again")
            content = shelf.read(name, collection, row)
            picture, kind = reduce_image(content, collection.row(row).path, shelf.config(name).max_pixels, px)
        except UnreadableImage:
            return Response(_UNREADABLE, media_type="image/svg+xml", headers=headers)
        except UserError as error:  # a collection that cannot be read
            raise HTTPException(503, str(error)) from None
        return Response(picture, media_type=f"image/{kind}", headers=headers)
