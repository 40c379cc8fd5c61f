"""What predict.py reads and writes: lists of images, rows, texts of tags, embeddings.

Nothing is written outside the folder of the images or the folder that the user names, links included.
"""

import csv
import glob
import io
import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.pixels import read_size
from data.scan import IMAGE_SUFFIXES
from data.tags.records import parse_text
from utils.errors import UserError
from utils.io.files import read_json, write_atomically, write_json
from utils.record.logging import get_logger

log = get_logger(__name__)

Row = dict[str, Any]
_KEPT_EVERY = 10_000  # images after which kohya's metadata, one JSON object, are written again


class Images(NamedTuple):
    """The images of a prediction, and the folder that holds all of them, an absolute path."""

    root: str
    paths: list[Path]


def find_images(source: str | Sequence[str], key: str) -> Images:
    """Return the images of a file, a folder with its subfolders, a pattern, a list of these, or `-` (stdin, by lines).

    Raises UserError (`key`) where one of them has none.
    """
    names = [source] if isinstance(source, str) else source
    if source == "-":
        names = [line for line in sys.stdin.read().split("\n") if line]
    found = [pair for name in names for pair in _find(name, key)]
    if not found:
        raise UserError(f"{key}: stdin names no image; write a path on each line")
    if unnamed := next((path for _, path in found if not _is_utf8(str(path))), None):
        raise UserError(f"{key}: the file name {str(unnamed)!r} is not UTF-8; rename the file")
    root = os.path.commonpath([os.path.abspath(folder) for folder, _ in found])
    return Images(root, list(dict.fromkeys(path for _, path in found)))


def _find(name: str, key: str) -> Iterator[tuple[Path, Path]]:
    """Yield the images that a text names, each with the folder that it was looked for in."""
    path = Path(name)
    if path.is_file():
        yield path.parent, path
    elif path.is_dir():
        yield from ((path, file) for file in _only_images(path.rglob("*"), f"{key}: {path} holds no image"))
    elif glob.has_magic(name):
        matches = map(Path, glob.iglob(name, recursive=True))
        yield from ((file.parent, file) for file in _only_images(matches, f"{key}: {name} matches no image"))
    else:
        raise UserError(f"{key}: {path} does not exist; name an image, a folder or a pattern such as 'a/**/*.png'")


def _only_images(paths: Iterable[Path], problem: str) -> list[Path]:
    found = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{problem}; known endings: {', '.join(IMAGE_SUFFIXES)}")
    return found


def _is_utf8(text: str) -> bool:
    """Return whether a text can be written; a file name may hold bytes that no text has."""
    return text == text.encode(errors="replace").decode()


class Destination:
    """Where predictions go. A row has `path`, and what was predicted or `error`."""

    def has(self, path: str) -> bool:
        """Return whether an image's prediction is there already."""
        raise NotImplementedError

    def tags(self, path: str) -> Sequence[str]:
        """Return an image's tags that are there already."""
        return ()

    def put(self, row: Row) -> None:
        """Write a row."""
        raise NotImplementedError

    def write(self, rows: Iterable[Row]) -> int:
        """Write each row when it comes; warn of errors, and return how many there are."""
        errors = 0
        for row in rows:
            if "error" in row:
                log.warning("unreadable image %s: %s", row["path"], row["error"])
                errors += 1
            self.put(row)
        return errors


class RowFile(Destination):
    """JSON lines, or CSV with some columns. keep: write behind the whole rows that are there; else replace them.

    Raises UserError (`output`) for a file of another ending, or with other rows than are to be kept.
    """

    def __init__(self, file: Path, columns: list[str], *, keep: bool) -> None:
        if file.suffix not in (".jsonl", ".csv"):
            raise UserError(
                f"output: {file} ends in {file.suffix!r}; name a .jsonl or .csv file; without like also .npz, and for "
                "tags .json, FOLDER/ or beside"
            )
        self._file, self._columns, self._keep = file, columns if file.suffix == ".csv" else None, keep
        content = file.read_bytes() if keep and file.is_file() else b""
        self._kept = content[: content.rfind(b"\n") + 1]  # a kill may have torn the last row
        try:
            self._done = {row["path"] for row in self._parse(io.StringIO(self._kept.decode("utf-8"), newline=""))}
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"output: {file} has other rows than such a prediction ({error}), so existing=skip cannot go on with "
                "it; name another file, or set existing=overwrite"
            ) from None

    def _parse(self, lines: io.StringIO) -> Iterable[Row]:
        if self._columns is None:
            return map(json.loads, lines)
        reader = csv.DictReader(lines)
        if reader.fieldnames not in (None, self._columns):
            raise ValueError(f"the columns {', '.join(reader.fieldnames)}")
        return reader

    def has(self, path: str) -> bool:
        """Return whether a kept row is of the image."""
        return path in self._done

    def write(self, rows: Iterable[Row]) -> int:
        """Write the rows, where none are kept in one piece at the end."""
        if not self._keep:
            return write_atomically(self._file, lambda temporary: self._write_to(temporary, rows))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return self._write_to(self._file, rows)

    def _write_to(self, file: Path, rows: Iterable[Row]) -> int:
        with open(file, "a", encoding="utf-8", newline="") as self._stream:
            self._stream.truncate(len(self._kept))
            self._table = csv.DictWriter(self._stream, self._columns or [], restval="", extrasaction="ignore")
            if self._columns is not None and not self._kept:
                self._table.writeheader()
            return super().write(rows)

    def put(self, row: Row) -> None:
        """Write a row, and leave it to the system."""
        if self._columns is None:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            self._table.writerow(row)
        self._stream.flush()


class Sidecars(Destination):
    """A text file per image: beside it, or at the same place below another folder; none of an unreadable image.

    `x.txt`, and `x.png.txt` where another image differs in its suffix alone. Raises UserError (`output`) where a link
    leads out.
    """

    def __init__(self, images: Images, folder: str | None) -> None:
        base, self._files = os.path.abspath(folder or images.root), {}
        places = {str(path): os.path.relpath(os.path.abspath(path), images.root) for path in images.paths}
        stems = Counter(os.path.splitext(place)[0] for place in places.values())
        real = os.path.realpath(base)
        for path, place in places.items():
            stem = os.path.splitext(place)[0]
            self._files[path] = file = Path(base, f"{stem if stems[stem] == 1 else place}.txt")
            if os.path.commonpath([real, target := os.path.realpath(file)]) != real:
                raise UserError(f"output: {file} is by a link outside {base}, at {target}; name a folder for the texts")

    def has(self, path: str) -> bool:
        """Return whether the file is there."""
        return self._files[path].exists()

    def tags(self, path: str) -> Sequence[str]:
        """Return the tags of the file."""
        try:
            return parse_text(self._files[path].read_text(encoding="utf-8-sig")).tags if self.has(path) else ()
        except UnicodeDecodeError as error:
            raise UserError(f"output: {self._files[path]} is not UTF-8 ({error}); save it as UTF-8") from None

    def put(self, row: Row) -> None:
        """Write the file."""
        if "tags" in row:
            text = row["tags"] + "\n"
            write_atomically(self._files[row["path"]], lambda file: file.write_text(text, "utf-8"), flush=False)


class KohyaMetadata(Destination):
    """kohya's metadata, one JSON object: entries of these images are updated, what else is there stays."""

    def __init__(self, images: Images, file: Path) -> None:
        self._file, self._put = file, 0
        try:
            self._entries = read_json(file) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"output: {file} cannot be read ({error}); repair it, or name another file") from None
        if not isinstance(self._entries, dict) or not all(isinstance(one, dict) for one in self._entries.values()):
            raise UserError(f"output: {file} is no metadata of kohya, an object of objects; name another file")
        self._keys = {str(path): self._find_key(str(path)) for path in images.paths}

    def _find_key(self, path: str) -> str:
        """Return an image's key: its path, or what is there for it (absolute, or from the file's folder, or a stem)."""
        full = os.path.abspath(path)
        names = (path, full, os.path.relpath(full, os.path.abspath(self._file.parent)))
        known = (*names, *(os.path.splitext(name)[0] for name in names))
        return next((name for name in known if name in self._entries), path)

    def has(self, path: str) -> bool:
        """Return whether the entry has tags."""
        return isinstance(self._entries.get(self._keys[path], {}).get("tags"), str)

    def tags(self, path: str) -> Sequence[str]:
        """Return the tags of the entry."""
        return parse_text(self._entries[self._keys[path]]["tags"]).tags if self.has(path) else ()

    def put(self, row: Row) -> None:
        """Update the entry."""
        if "tags" in row:
            entry = self._entries.setdefault(self._keys[row["path"]], {})
            entry |= {"tags": row["tags"], "image_size": list(read_size(row["path"]))}
            self._put += 1
            if self._put % _KEPT_EVERY == 0:
                write_json(self._file, self._entries)

    def write(self, rows: Iterable[Row]) -> int:
        """Update the entries, and write them now and then."""
        errors = super().write(rows)
        write_json(self._file, self._entries)
        return errors


def write_embeddings(file: Path, paths: Sequence[str], vectors: np.ndarray, weights: str) -> None:
    """Write the embeddings of images [N, D] and the hash of the weights as .npz, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.savez(stream, paths=np.array(paths), vectors=vectors, weights=np.array(weights))

    write_atomically(file, write)


def read_embeddings(file: Path, weights: str) -> tuple[list[str], np.ndarray]:
    """Return the paths and the embeddings of a file. Raises UserError (`input`) for none, or those of other weights."""
    try:
        with np.load(file) as arrays:
            paths, vectors, theirs = arrays["paths"].tolist(), arrays["vectors"], arrays["weights"].item()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"input: {file} has no embeddings ({error}); predict.py output=x.npz writes them") from None
    if theirs != weights:
        raise UserError(f"input: {file} has embeddings of other weights; write it again with these")
    return paths, vectors


def rank(paths: Sequence[str], vectors: np.ndarray, query: np.ndarray, top: int) -> list[Row]:
    """Return rows of the images whose vectors [N, D] have the greatest cosine with one [D]."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    cosine = vectors @ query / np.maximum(norms, np.finfo(np.float32).tiny)
    order = np.argsort(-cosine, kind="stable")[:top]
    return [{"path": paths[index], "similarity": round(float(cosine[index]), 6)} for index in order]
