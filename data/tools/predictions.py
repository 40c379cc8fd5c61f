"""What predict.py reads and writes: lists of images, rows, texts of tags, embeddings.

Nothing is written outside the folder of the images or the folder that the user names, links included.
"""

import csv
import glob
import io
import json
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import TextConfig
from data.layouts.folders import IMAGE_SUFFIXES
from data.layouts.records import parse_text
from data.tags.spelling import Tag, parse_tag, with_spaces
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.record.logging import get_logger
from utils.vocabulary import RATING

log = get_logger(__name__)

Row = dict[str, Any]
_PARENTHESES = re.compile(r"[()]")


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
    folders, paths = set(), {}
    for path in map(Path, names):
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
        found = sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        found = [path] if path.is_file() else found
        if not found:
            raise UserError(
                f"{key}: {path} is no image, and no folder or pattern (such as 'a/**/*.png') of any; known endings: "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        paths |= dict.fromkeys(found)
        folders |= {path} if path.is_dir() else {file.parent for file in found}
    if not paths:
        raise UserError(f"{key}: stdin names no image; write a path on each line")
    for path in paths:
        if str(path) != str(path).encode(errors="replace").decode():
            raise UserError(f"{key}: the file name {str(path)!r} is not UTF-8; rename the file")
    return Images(os.path.commonpath([os.path.abspath(folder) for folder in folders]), list(paths))


class RowFile:
    """JSON lines, or CSV with some columns. keep: write behind the whole rows that are there; else replace them.

    Raises UserError (`output`) for a file of another ending, or with other rows than are to be kept.
    """

    def __init__(self, file: Path, columns: list[str], *, keep: bool) -> None:
        if file.suffix not in (".jsonl", ".csv"):
            raise UserError(
                f"output: {file} ends in {file.suffix!r}; name a .jsonl or .csv file; without like also .npz, and for "
                "tags FOLDER/ or beside"
            )
        self._file, self._columns, self._keep = file, columns if file.suffix == ".csv" else None, keep
        content = file.read_bytes() if keep and file.is_file() else b""
        self._kept = content[: content.rfind(b"\n") + 1]  # a kill may have torn the last row
        try:
            lines = io.StringIO(self._kept.decode("utf-8"), newline="")
            there = map(json.loads, lines) if self._columns is None else csv.DictReader(lines)
            self._done = {row["path"] for row in there}
            if self._done and self._columns not in (None, there.fieldnames):
                raise ValueError(f"the columns {', '.join(there.fieldnames)}")
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"output: {file} has other rows than such a prediction ({error}), so existing=skip cannot go on with "
                "it; name another file, or set existing=overwrite"
            ) from None

    def has(self, path: str) -> bool:
        """Return whether a kept row is of the image."""
        return path in self._done

    def write(self, rows: Iterable[Row]) -> None:
        """Write the rows, each when it comes; where none are kept, the file takes its name at the end."""

        def fill(file: Path) -> None:
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

        if self._keep:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fill(self._file)
        else:
            write_atomically(self._file, fill)


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
        """Return the tags of the file. Raises UserError (`output`) where it is not UTF-8."""
        try:
            return parse_text(self._files[path].read_text(encoding="utf-8-sig")).tags if self.has(path) else ()
        except UnicodeDecodeError as error:
            raise UserError(f"output: {self._files[path]} is not UTF-8 ({error}); save it as UTF-8") from None

    def write(self, rows: Iterable[Row]) -> None:
        """Write the files, each when its row comes."""
        for row in rows:
            if "tags" in row:
                text = f"{row['tags']}\n"
                file = self._files[row["path"]]
                write_atomically(file, lambda temporary, text=text: temporary.write_text(text, "utf-8"), flush=False)


# ------------------------------------------------------------------------------------------------------------- tags


def find_excluded(names: Sequence[str], categories: Sequence[int], exclude: Sequence[str]) -> np.ndarray:
    """Return which tags are among those excluded, bool [T]; warns of texts that are none of them."""
    texts = {parse_tag(text): text for text in exclude}
    both = [{Tag(None, parse_tag(name).name), Tag(number, name)} for name, number in zip(names, categories)]
    if unknown := [text for tag, text in texts.items() if not any(tag in tags for tags in both)]:
        log.warning("text.exclude: not among the tags of these weights: %s", ", ".join(unknown))
    return np.array([not tags.isdisjoint(texts) for tags in both])


def spell_tags(names: Iterable[str], rating: str | None, config: TextConfig) -> list[str]:
    """Return names as they are written, with the rating where it is wanted."""
    words = [with_spaces(name) if config.spaces else name for name in names]
    if config.escape:
        words = [_PARENTHESES.sub(r"\\\g<0>", word) for word in words]
    if config.rating is None or rating is None:
        return words
    return [f"rating:{rating}", *words] if config.rating == "first" else [*words, f"rating:{rating}"]


def join_tags(words: Iterable[str], separator: str) -> str:
    """Join tags, each once, as its first text spells it."""
    first: dict[Tag | str, str] = {}
    for word in words:
        tag = parse_tag(word)
        first.setdefault(tag if tag.category == RATING else tag.name, word)
    return separator.join(first.values())


# ------------------------------------------------------------------------------------------------------- embeddings


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
