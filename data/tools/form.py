"""Predictions in the form of another table, such as the sample submission of a competition."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.layouts.sidecars import decode
from data.layouts.table import show_some
from data.tools.predictions import Choose, Images, Row
from utils.errors import UserError, about
from utils.io.files import readable

_NUMBER = re.compile(r"[-+]?\d*\.?\d+")


class Form(NamedTuple):
    """A table whose first column has ids of images.

    images: those of the ids. has_probs: whether the other columns are probabilities of the classes or tags that they
    name; else there is one, for the class or the tags. fill: from predictions to the rows of the table; the row of an
    image that cannot be read stays as it is.
    """

    columns: list[str]
    images: Images
    has_probs: bool
    fill: Choose


def read_form(file: Path, given: Images, names: Sequence[str], *, has_tags: bool) -> Form:
    """Read a CSV file for predictions of some images as classes or tags. Raises UserError (`form`)."""
    with about("form"), readable(file, ".csv"):
        table = csv.DictReader(io.StringIO(decode(file.read_bytes())))
        rows = list(table)
        ids, *columns = table.fieldnames
        values = [row[columns[0]] for row in rows]
    known: dict[str, Path | None] = {}
    for path in given.paths:
        whole = os.path.relpath(path, given.root)
        for name in {whole, path.name, os.path.splitext(whole)[0], path.stem}:
            known[name] = None if name in known else path
    paths = [known.get(row[ids]) for row in rows]
    if wrong := [row[ids] for row, path in zip(rows, paths) if path is None]:
        raise UserError(
            f"form: {len(wrong):,} of {len(rows):,} in the first column, {ids!r}, of {file} have no image of input, or "
            f"several: {show_some(wrong)}; input has images such as {given.paths[0]}"
        )
    differing = {*columns}.difference(names)
    has_probs = len(columns) > 1 or not differing
    if len(columns) > 1 and not has_tags:
        differing = {*columns}.symmetric_difference(names)
    is_number = _NUMBER.fullmatch(values[0]) and not any(map(_NUMBER.fullmatch, names))
    if differing and (has_probs or is_number):
        raise UserError(
            f"form: {file} takes numbers, but its columns and the classes of the weights differ in "
            f"{show_some(sorted(differing))}; the weights have {show_some(names)}; name each column as the class whose "
            "probability it takes"
        )

    def fill(predicted: Iterable[Row]) -> Iterator[Row]:
        by_path = {row["path"]: row for row in predicted}
        for row, path in zip(rows, map(str, paths)):
            yield {"path": path, **row, **_fill(by_path[path], columns, has_probs)}

    return Form([ids, *columns], Images(given.root, list(dict.fromkeys(paths))), has_probs, fill)


def _fill(row: Row, columns: Sequence[str], has_probs: bool) -> Row:
    """Return the values of columns for a prediction; none for an image that cannot be read."""
    probs = {each["class"]: each["prob"] for each in row.get("top", ())}
    for group in row.get("probs", {}).values():  # of tags, by category
        probs |= group
    if "error" in row or has_probs:
        return {column: probs[column] for column in columns if column in probs}
    return {columns[0]: row.get("class", row.get("tags"))}
