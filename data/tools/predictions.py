"""Input and output of predict.py: lists of images, rows, tag files, embeddings.

Nothing is written outside the image folder or the folder that the user sets, even through links.
"""

import base64
import csv
import glob
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os.path import abspath, commonpath, isfile, relpath
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from data.layouts.names import IMAGE_SUFFIXES, is_passed_over
from data.layouts.sidecars import decode
from data.layouts.table import show_some
from data.layouts.unused import UNREAD, Unused, say_unused
from data.layouts.walk import NOT_UTF8, is_picture, walk_folders
from data.tags.rules import TagRules, TextConfig
from utils.errors import UserError
from utils.formats.spelling import CATEGORIES, Tag, is_sentence, parse_tag, split_tags, write_tag
from utils.io.files import Json, remove_temporary, write_atomically
from utils.io.journal import Journal
from utils.io.memo import file_version
from utils.io.names import find_path, is_utf8, show_file_name
from utils.io.safe_text import safe_row
from utils.record.logging import log

_LINE = re.compile(rb"""^(["']?)(.+?)\1\r?$""", re.MULTILINE)  # of stdin; Windows and `ls -Q` write quotes

Row = Json
Choose = Callable[[Iterable[Row]], Iterable[Row]]


class ImageList(NamedTuple):
    """The images of a prediction, and the absolute path of their common folder."""

    root: str
    paths: list[Path]


def list_images(source: str | Sequence[str], key: str) -> ImageList:
    """Return the images of a file, a folder (recursively), a pattern, a list of these, or `-` (stdin, one per line).

    Raises UserError (`key`) if one of these has no image.
    """
    names = [source] if isinstance(source, str) else source
    if source == "-":
        names = [os.fsdecode(name) for _, name in _LINE.findall(sys.stdin.buffer.read())]
    folders = set()
    paths = {}
    absent = []
    unused = Unused()
    for path in map(Path, map(find_path, names)):
        files = [path] if isfile(path) else _list_folder(path, unused)
        absent += [] if files else [show_file_name(str(path))]
        folders |= {path} if path.is_dir() else {file.parent for file in files}
        for file in files:
            if is_utf8(str(file)):
                paths[file] = None
            else:
                unused.add(NOT_UTF8, show_file_name(str(file)))
    unused.pop(UNREAD, None)  # a prediction needs no table
    say_unused(unused.describe(), key)
    if absent or not paths:
        raise UserError(
            f"{key}: {show_some(absent or names) or 'stdin'} is no image, and no folder or pattern (such as "
            f"'a/**/*.png') with images; known endings: {', '.join(IMAGE_SUFFIXES)}"
        )
    return ImageList(commonpath(map(abspath, folders)), list(paths))


def _list_folder(path: Path, unused: Unused) -> list[Path]:
    """Return the images in a folder or of a pattern, sorted; hidden ones only if `path` names their folder."""
    if path.is_dir():
        walked = walk_folders(path, unused, follows_links=False)  # outputs beside images stay in the folder
        found = itertools.chain.from_iterable(map(folder.__add__, names) for folder, _, names in walked)
        return sorted(path / name for name in found if is_picture(path, name))
    files = filter(Path.is_file, map(Path, glob.iglob(str(path), recursive=True)))
    shown = (file for file in files if not any(map(is_passed_over, {*file.parts} - {*path.parts})))
    return sorted(file for file in shown if is_picture(file.parent, file.name))


class Predicted:
    """The rows of a prediction, in its journal, which also has the rows of a killed call of the same command.

    A row counts while its image is unchanged. known: for each path in the journal, whether the row counts.
    """

    def __init__(self, journal: Journal, paths: Sequence[Path]) -> None:
        self._journal = journal
        self._versions = {str(path): file_version(path) or [time.time_ns()] for path in paths}
        rows = chain.from_iterable(journal.parts())
        self.known = {row["path"]: version == self._versions.get(row["path"]) for version, row in rows}

    def _parts(self) -> Iterator[list[Row]]:
        """Yield the rows of each batch."""
        for part in self._journal.parts():
            yield [row for version, row in part if version == self._versions.get(row["path"])]

    def write(self, batches: Iterable[list[Row]], destination: "Destination") -> None:
        """Write batches as they arrive, after the rows of a killed call."""
        remove_temporary(destination.folders)
        for rows in self._parts():  # again, because the killed call may not have written all
            destination.write_each(rows)
        for rows in batches:
            self._journal.add([(self._versions[row["path"]], row) for row in rows])
            destination.write_each(rows, replace=True)
        destination.write_all(chain.from_iterable(self._parts()))


class Destination:
    """The output of a prediction: one file, or a file for each image in `folders` below `folder`."""

    folder: Path | None = None
    folders: Iterable[Path] = ()

    def has(self, path: str) -> bool:
        """Return whether an earlier command has written the image's result."""
        return False

    def tags(self, path: str) -> Sequence[str]:
        """Return the present tags of an image."""
        return ()

    def write_each(self, rows: Iterable[Row], *, replace: bool = False) -> None:
        """Write the files of some images, if each image has a file. replace: even those that exist."""

    def write_all(self, rows: Iterable[Row]) -> None:
        """Write the file of all images, if they share one."""


class RowFile(Destination):
    """JSON lines, or CSV with the given columns. keep: append the new rows to the file, instead of replacing it.

    choose: selects the rows to write from the rows of all images. Raises UserError (`output`) for another file ending,
    or if the kept rows have another format.
    """

    def __init__(self, file: Path, columns: list[str], *, keep: bool, choose: Choose = iter) -> None:
        if file.suffix not in (".jsonl", ".csv"):
            raise UserError(
                f"output: {file} ends in {file.suffix!r}; set a .jsonl or .csv file, for embeddings .npz, for tags "
                "FOLDER/ or beside"
            )
        self._file = file
        self._columns = columns if file.suffix == ".csv" else None
        self._choose = choose
        try:
            self._kept = self._read() if keep and file.is_file() else []
            self._done = {row["path"] for row in self._kept}
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"output: {file} has other rows than this prediction ({error}), so existing=skip cannot continue it; "
                "set another file, or existing=overwrite"
            ) from None

    def _read(self) -> list[Row]:
        """Return the rows of the file. Raises ValueError for other columns."""
        with open(self._file, encoding="utf-8", newline="") as lines:
            if self._columns is None:
                return list(map(json.loads, lines))
            rows = csv.DictReader(lines)
            if rows.fieldnames not in (None, self._columns):
                raise ValueError(f"the columns {', '.join(rows.fieldnames)}")
            return list(rows)

    def has(self, path: str) -> bool:
        """Return whether the image has a kept row."""
        return path in self._done or f"'{path}" in self._done  # `safe_row`

    def write_all(self, rows: Iterable[Row]) -> None:
        """Write the kept rows and the others. The file gets its name when it is complete."""
        new = (row for row in self._choose(rows) if not self.has(row["path"]))
        every = chain(self._kept, new)

        def fill(file: Path) -> None:
            with open(file, "w", encoding="utf-8", newline="") as stream:
                if self._columns is None:
                    stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in every)
                else:
                    table = csv.DictWriter(stream, self._columns, restval="", extrasaction="ignore")
                    table.writeheader()
                    table.writerows(map(safe_row, every) if "error" in self._columns else every)  # not in a form

        write_atomically(self._file, fill)


class Sidecars(Destination):
    """One text file per readable image: beside it, or at the same relative path in another folder.

    The name is `x.txt`, or `x.png.txt` if another image only differs in its suffix.
    replace: replace existing files. Raises UserError (`output`) for a link out of the folder.
    """

    def __init__(self, images: ImageList, folder: str | None, *, replace: bool) -> None:
        base = Path(abspath(folder or images.root))
        self._replace = replace
        self._files: dict[str, Path] = {}
        beside = {str(path): base / relpath(abspath(path), images.root) for path in images.paths}
        stems = Counter(image.with_suffix("") for image in beside.values())
        for path, image in beside.items():
            file = image.with_suffix(".txt" if stems[image.with_suffix("")] == 1 else f"{image.suffix}.txt")
            if not file.resolve().is_relative_to(base.resolve()):
                raise UserError(
                    f"output: {file} is a link out of {base}, to {file.resolve()}; set a folder for the texts"
                )
            self._files[path] = file
        self.folders = {file.parent for file in self._files.values()}
        self.folder = base if folder or os.access(base, os.W_OK) else images.paths[0].parent

    def has(self, path: str) -> bool:
        """Return whether the text file exists."""
        return self._files[path].exists()

    def tags(self, path: str) -> Sequence[str]:
        """Return the tags in the text file. Raises UserError (`output`) if it is not UTF-8."""
        try:
            return split_tags(decode(self._files[path].read_bytes())) if self.has(path) else ()
        except UnicodeDecodeError as error:
            raise UserError(f"output: {self._files[path]} is not UTF-8 ({error}); save it as UTF-8") from None

    def write_each(self, rows: Iterable[Row], *, replace: bool = False) -> None:
        """Write the text files."""
        for row in rows:
            if "tags" in row and (replace or self._replace or not self.has(row["path"])):
                write = partial(Path.write_text, data=f"{row['tags']}\n", encoding="utf-8")
                write_atomically(self._files[row["path"]], write, flush=False)


# ------------------------------------------------------------------------------------------------------------- tags


def find_excluded(names: Sequence[str], categories: Sequence[int], exclude: Sequence[str]) -> ndarray:
    """Return for each tag whether it is excluded, bool [T]; warn of unknown texts in `exclude`."""
    texts = {parse_tag(text): text for text in exclude}
    both = [{Tag(None, parse_tag(name).name), Tag(number, name)} for name, number in zip(names, categories)]
    known = set().union(*both)
    if unknown := [text for tag, text in texts.items() if tag not in known]:
        log.warning("text.exclude: not among the tags of these weights: %s", ", ".join(unknown))
    return np.array([not tags.isdisjoint(texts) for tags in both])


def arrange_tags(tags: Iterable[Tag], config: TextConfig, rules: TagRules) -> list[Tag]:
    """Return tags after their aliases and in their order, without implied tags."""
    kept = []
    implied = set()
    for tag, *others in map(rules.expand, tags):
        kept.append(tag)
        implied |= {other.name for other in others}
    kept = [tag for tag in kept if tag.name not in implied]
    first = [parse_tag(text).name for text in config.first_tags]
    order = [CATEGORIES[name] for name in config.category_order]
    kept.sort(key=lambda tag: ([*first, tag.name].index(tag.name), [*order, tag.category].index(tag.category)))
    return kept


def spell_tags(row: Row, config: TextConfig, rules: TagRules) -> list[str]:
    """Return the texts of a row's tags, with its rating if `config.rating` is set.

    Texts that would be read as a sentence keep their underscores.
    """
    categories = {}  # of each name; two tags may share one
    for category, names in row["probs"].items():
        for name in names:
            categories.setdefault(name, []).append(CATEGORIES.get(category))
    tags = arrange_tags((Tag(categories[name].pop(0), name) for name in row["tags"]), config, rules)
    rating = [f"rating:{row['rating']}"] if config.rating and "rating" in row else []
    words = []
    for spaces in (config.spaces, False):
        words = [write_tag(tag, category=config.categories, spaces=spaces, escape=config.escape) for tag in tags]
        words = [*rating, *words] if config.rating == "first" else [*words, *rating]
        if not any(map(is_sentence, [words, *([word] for word in words)] if words else ())):
            break
    return words


# ------------------------------------------------------------------------------------------------------- embeddings


def embedding_rows(vectors: Iterable[ndarray]) -> list[Row]:
    """Return a row for each embedding [D]."""
    return [{"vector": base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")} for vector in vectors]


@dataclass(frozen=True)
class Embeddings(Destination):
    """The paths and embeddings [N, D] of the readable images and the hash of the weights, as .npz."""

    file: Path
    weights: str

    def write_all(self, rows: Iterable[Row]) -> None:
        """Write the file. Raises UserError (`input`) if no image can be read."""
        pairs = [
            (row["path"], np.frombuffer(base64.b64decode(row["vector"]), "<f4")) for row in rows if "vector" in row
        ]
        if not pairs:
            raise UserError("input: no image can be read; see the warnings")
        paths, vectors = map(np.stack, zip(*pairs))

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as stream:
                np.savez(stream, paths=paths, vectors=vectors, weights=np.array(self.weights))

        write_atomically(self.file, write)
