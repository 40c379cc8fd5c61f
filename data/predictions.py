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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.pixels import read_size
from data.scan import IMAGE_SUFFIXES
from data.tags.records import parse_text
from utils.errors import UserError
from utils.io.files import read_json, write_atomically, write_json

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
        if not names:
            raise UserError(f"{key}: stdin names no image; write a path on each line")
    folders, paths = set(), {}
    for name in names:
        path = Path(name)
        found = [path] if path.is_file() else _list_images(path, key)
        paths |= dict.fromkeys(found)
        folders |= {path} if path.is_dir() else {file.parent for file in found}
    for path in paths:
        if str(path) != str(path).encode(errors="replace").decode():
            raise UserError(f"{key}: the file name {str(path)!r} is not UTF-8; rename the file")
    return Images(os.path.commonpath([os.path.abspath(folder) for folder in folders]), list(paths))


def _list_images(path: Path, key: str) -> list[Path]:
    """Return the images of a folder, or that match a pattern."""
    if not path.is_dir() and not glob.has_magic(str(path)):
        raise UserError(f"{key}: {path} does not exist; name an image, a folder or a pattern such as 'a/**/*.png'")
    files = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
    found = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not found:
        problem = "holds" if path.is_dir() else "matches"
        raise UserError(f"{key}: {path} {problem} no image; known endings: {', '.join(IMAGE_SUFFIXES)}")
    return found


class RowFile:
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

    def write(self, rows: Iterable[Row]) -> None:
        """Write the rows; where none are kept, the file takes its name at the end."""
        if self._keep:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._write_to(self._file, rows)
        else:
            write_atomically(self._file, lambda temporary: self._write_to(temporary, rows))

    def _write_to(self, file: Path, rows: Iterable[Row]) -> None:
        with open(file, "a", encoding="utf-8", newline="") as stream:
            stream.truncate(len(self._kept))
            table = csv.DictWriter(stream, self._columns or [], restval="", extrasaction="ignore")
            if self._columns is not None and not self._kept:
                table.writeheader()
            for row in rows:
                if self._columns is None:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    table.writerow(row)
                stream.flush()


class Sidecars:
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

    def write(self, rows: Iterable[Row]) -> None:
        """Write the files."""
        for row in rows:
            if "tags" in row:
                write_atomically(
                    self._files[row["path"]], lambda file, row=row: file.write_text(f"{row['tags']}\n", "utf-8"),
                    flush=False,
                )  # fmt: skip


class KohyaMetadata:
    """kohya's metadata, one JSON object: entries of these images are updated, what else is there stays.

    Raises UserError (`output`) for a file that is something else.
    """

    def __init__(self, images: Images, file: Path) -> None:
        self._file = file
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

    def write(self, rows: Iterable[Row]) -> None:
        """Update the entries, and write them now and then."""
        for number, row in enumerate((row for row in rows if "tags" in row), start=1):
            entry = self._entries.setdefault(self._keys[row["path"]], {})
            entry |= {"tags": row["tags"], "image_size": list(read_size(row["path"]))}
            if number % _KEPT_EVERY == 0:
                write_json(self._file, self._entries)
        write_json(self._file, self._entries)


# Where predictions go. A row has `path`, and what was predicted or `error`; each is written when it comes.
Destination = RowFile | Sidecars | KohyaMetadata


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
