"""Concepts: folders that make one collection, each with its own repeats or share, captions and weight.

A concept is an index per row, the column CONCEPT. `data.concepts` is the table; the index of a collection keeps it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from data.collection.split import assign_validation
from data.layouts.corrections import correct, read_corrections
from data.layouts.folders import REPEATS
from data.layouts.names import CORRECTIONS, CSV, JSONL, PARQUET, POSTS, is_image_name, is_passed_over
from data.layouts.recognise import recognise
from data.layouts.remote import is_remote
from data.layouts.table import PLACES, build_table, replace_column
from data.layouts.tables import find_one
from data.layouts.unused import Unused
from data.layouts.walk import check_root, list_folder
from utils.config.bounds import Count, Fraction, Positive
from utils.config.schema import PathText, Strict
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

CONCEPT = "concept"  # a column: the index of a row's concept


class ConceptConfig(Strict):
    """A folder of images, in any layout of docs/collections.md.

    path: below data.root, or anywhere; of nested concepts, the inner one has the image. repeats: how often an epoch
    names each image (null: once); share: of an epoch, instead of repeats. trigger: the caption of an image without a
    caption and tags. captions: keys of task.captions with other values. mask: null: as the task says. is_prior: images
    that keep what the model knows: they are not validated, and have a loss of their own. weight: a factor of the loss.
    """

    path: PathText
    repeats: Count | None = None
    share: Fraction | None = None
    trigger: str | None = None
    captions: dict[str, bool | int | float | str | list[str] | dict[str, float] | None] = {}
    mask: bool | None = None
    is_prior: bool = False
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        if self.share is not None and self.repeats is not None:
            raise ValueError(f"{self.path!r} has repeats={self.repeats} and share={self.share:g}; give one of them")
        return self


Split = Callable[[pa.Table, float], pa.Table]  # `assign_validation`, and then the corrections


def recognise_concepts(
    root: str, concepts: Sequence[ConceptConfig], fraction: float, cache: Path, unused: Unused, corrections: bool
) -> tuple[list[Path], Callable[[], pa.Table]]:
    """Return the files of `recognise` for `root`, or for its concepts, and how to read one table with splits.

    Each concept is split as a collection of its own. corrections: take those of each.
    Raises UserError (`data.root`, or `data.concepts.N.path`, or `data.corrections`).
    """

    def find(folder: str) -> tuple[list[Path], Callable[[], pa.Table], Split]:
        files, read = recognise(folder, cache, unused)
        decisions = {} if not corrections or is_remote(folder) else read_corrections(base := check_root(folder))
        if not decisions:
            return files, read, assign_validation
        file = base / CORRECTIONS
        log.info("data.corrections: %s has decisions on %s labels and lists of tags", file, f"{len(decisions):,}")
        split = lambda table, fraction: correct(assign_validation(table, fraction), decisions, unused)  # noqa: E731
        return files and [*files, file], read, split

    if not concepts:
        files, read, split = find(root)
        return files, lambda: split(read(), fraction)
    base, folders, found = os.path.abspath(os.path.expanduser(root)), find_folders(root, concepts), []
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"data.concepts.{number}.path: {folder!r} is there twice; join both, and their repeats")
        with _naming(number):
            found.append(find(folder))

    def read_all() -> pa.Table:
        tables = []
        for number, (concept, (_, read, split)) in enumerate(zip(concepts, found)):
            with _naming(number):
                table = _read_one(concept, read, fraction, split)
            inner = [each for each in folders if each.startswith(os.path.join(folders[number], ""))]
            tables.append(_place(table, number, base, folders[number], inner))
        packed = [PLACES.keys() <= set(table.column_names) for table in tables]
        if any(packed) and not all(packed):
            one, other = (concepts[packed.index(is_packed)].path for is_packed in (True, False))
            raise UserError(f"data.concepts: {one!r} has shards and {other!r} has files; pack all of them, or none")
        try:
            joined = pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            raise UserError(f"data.concepts: the manifests have a column of several types ({error})") from error
        return build_table(dict(zip(joined.column_names, joined.columns)))

    files = [own for own, _, _ in found]
    return sum(files, []) if all(files) else [], read_all


def find_repeats(root: str) -> list[ConceptConfig]:
    """Return the folders `10_name` of sd-scripts as concepts: all folders of the root, or those in its img and reg.

    There is none if another folder or an image is among them. Images of reg are half of an epoch, as in sd-scripts.
    """
    if is_remote(root) or find_one(folder := check_root(root), (PARQUET, JSONL, CSV, *POSTS)) is not None:
        return []
    parts = [part for part in ("img", "reg") if (folder / part).is_dir()] if (folder / "img").is_dir() else [""]
    found = [(part, each) for part in parts for each in list_folder(folder / part) if not is_passed_over(each.name)]
    names = [(part, each.name) for part, each in found if each.is_dir()]
    matches = [REPEATS.fullmatch(name) for _, name in names]
    if None in matches or any(is_image_name(each.name) for _, each in found):
        return []
    priors, concepts = [part for part, _ in names].count("reg"), []
    for (part, name), match in sorted(zip(names, matches)):
        how = {"share": 0.5 / priors, "is_prior": True} if part == "reg" else {"repeats": int(match[1])}
        concepts.append(ConceptConfig(path=os.path.join(part, name), trigger=match[2], **how))
    return concepts


def find_folders(root: str, concepts: Sequence[ConceptConfig]) -> list[str]:
    """Return the absolute folder of each concept."""
    base = os.path.abspath(os.path.expanduser(root))
    return [os.path.abspath(os.path.join(base, os.path.expanduser(concept.path))) for concept in concepts]


def _read_one(concept: ConceptConfig, read: Callable[[], pa.Table], fraction: float, split: Split) -> pa.Table:
    """Return the table of a concept, with its splits, and with the trigger as the caption of rows without a text."""
    table = read()
    if concept.is_prior:
        table, fraction = replace_column(table, "split", pa.array(["train"] * len(table))), 0.0
    table = split(table, fraction)
    if concept.trigger is not None:
        has_caption = pc.not_equal(pc.utf8_trim_whitespace(table["caption"]), "").fill_null(False)
        has_text = pc.or_(has_caption, pc.greater(pc.list_value_length(table["tags"]), 0))
        table = replace_column(table, "caption", pc.if_else(has_text, table["caption"], concept.trigger))
    return table


def _place(table: pa.Table, number: int, base: str, folder: str, inner: Sequence[str]) -> pa.Table:
    """Return a concept's table with the index, and paths relative to `base`, or absolute outside it.

    Rows in the folders `inner`, of other concepts, are dropped, and so is the column `group`, which only counts within
    a manifest.
    """
    prefix = os.path.relpath(folder, base) if folder.startswith(os.path.join(base, "")) else folder
    for name in {"path", "shard"} & set(table.column_names):
        paths = (os.path.join("" if folder == base else prefix, path) for path in table[name].to_pylist())
        table = replace_column(table, name, pa.array(paths, pa.string()))
    if inner := tuple(os.path.join(each, "") for each in inner):
        whole = (os.path.join(base, path) for path in table["path"].to_pylist())
        table = table.filter(pa.array([not path.startswith(inner) for path in whole], pa.bool_()))
    table = replace_column(table, CONCEPT, pa.array(np.full(len(table), number)))
    return table.drop_columns([name for name in table.column_names if name == "group"])


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Let a UserError about data.root name the path of a concept."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).replace("data.root", f"data.concepts.{number}.path"),)
        raise


def count_positions(concepts: Sequence[ConceptConfig], counts: np.ndarray) -> np.ndarray:
    """Return how many positions of an epoch each concept has, int64 [C]. counts: its samples, [C].

    repeats: that many for each sample. share: this part of the epoch; without repeats anywhere, shares count relative
    to their sum, and an epoch is as long as every sample needs to occur. Raises UserError (`data.concepts`).
    """
    shares = np.array([concept.share or 0.0 for concept in concepts])
    fixed = counts * [0 if concept.share is not None else concept.repeats or 1 for concept in concepts]
    if len(without := np.flatnonzero((shares > 0) & (counts == 0))):
        path = concepts[without[0]].path
        raise UserError(f"data.concepts.{without[0]}.share: no training image of {path!r} can have it; remove it")
    total, most = shares.sum(), 1.0 if fixed.any() else np.inf
    if total >= most or (total == 0 and not fixed.any()):
        raise UserError(f"data.concepts: the shares sum to {total:g}; above 0 is allowed, beside repeats below 1")
    if fixed.any():
        return fixed + share_out(shares, round(fixed.sum() / (1 - total) * total))
    used = shares > 0
    return share_out(shares, int(np.ceil((counts[used] * total / shares[used]).max() - 1e-9)))


def share_out(weights: np.ndarray, count: int) -> np.ndarray:
    """Divide `count` by weights into whole numbers, int64, by largest remainders; of equal ones, the first."""
    exact = weights * (count / (weights.sum() or 1.0))
    whole = np.floor(exact + 1e-9).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: count - whole.sum()]] += weights.any()
    return whole
