"""Predictions in the form of another table, such as the sample submission of a competition."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.layouts.listed import build_finder
from data.layouts.table import TEST, show_some
from data.layouts.tables import read_columns
from data.tools.predictions import Row
from utils.errors import UserError


class Form(NamedTuple):
    """A table whose first column has ids of images; paths: the image of each row.

    has_probs: whether the other columns are named as classes or tags, and take their probabilities; else the second
    column takes the class, the tags or the number.
    """

    columns: list[str]
    rows: list[Row]
    paths: list[str]
    has_probs: bool

    def fill(self, predicted: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows of the table with predictions; the row of an unreadable image stays unchanged.

        predicted: with `probs` by name if `has_probs`, else as predict.py writes them.
        """
        by_path = {row["path"]: row for row in predicted}
        ids, first, *_ = self.columns
        for path, row in zip(self.paths, self.rows):
            answer = by_path[path]
            values = answer.get("probs", {})
            if not self.has_probs:
                values = {first: answer[name] for name in ("class", "tags", "number") if name in answer}  # noqa: B035
            yield {"path": path, **row, **values, ids: row[ids]}


def read_form(file: Path, images: Sequence[Path], names: Sequence[str]) -> Form:
    """Read a table for predictions of some images as classes, tags or numbers. Raises UserError (`form`)."""
    table = read_columns(file, "form")
    ids, *columns = table.column_names
    has_probs = {*columns} <= {*names}
    if not columns or (len(columns) > 1 and not has_probs):
        raise UserError(
            f"form: {file} has the columns {show_some(table.column_names)}; after the ids comes one column, for the "
            f"class, tags or number, or columns with names of the weights, for probabilities: {show_some(names)}"
        )
    rows = table.to_pylist()
    find = build_finder(dict.fromkeys(map(str, images)))
    paths = [find(str(row[ids]), TEST) for row in rows]
    if wrong := [str(row[ids]) for row, path in zip(rows, paths) if path is None]:
        raise UserError(
            f"form: {file} names {len(wrong):,} images that input lacks or has several times: {show_some(wrong)}; "
            f"it has images such as {min(images)}"
        )
    return Form(table.column_names, rows, paths, has_probs)
