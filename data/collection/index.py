"""Index a collection: read it, or the folders of its concepts, once into an Arrow file that all processes map."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table
from pyarrow.feather import write_feather
from pydantic import TypeAdapter

from data.collection.concepts import CONCEPT, ConceptConfig, find_folders
from data.collection.split import Share, exclude_twins, split_corrected
from data.layouts.names import CORRECTIONS, IMAGE_SUFFIXES, is_remote
from data.layouts.recognise import Layout, find_layout
from data.layouts.scan import TableChoice
from data.layouts.table import SCHEMA, TEST, build_table, has_value, hash_table, is_packed, replace_column
from data.layouts.unused import POSSIBLE, Unused, list_faults, say_unused
from data.layouts.values import RULES
from data.layouts.walk import check_root
from data.validity.finding import Finding
from data.validity.questions import ask
from utils.errors import UserError
from utils.io.files import sha256_text, write_atomically
from utils.io.memo import files_key, own_cache
from utils.record.logging import log
from utils.start import open_name

CACHE = Path("outputs/cache/collections")  # of indexes, for all commands
FACTS = b"facts"  # JSON in the metadata of an index: the attributes of a `Collection`, and `unused`
CONCEPT_LIST = TypeAdapter(list[ConceptConfig])
_INDEX = 25  # format version; increment it to rebuild every index


@dataclass(frozen=True)
class _Part:
    """A folder of a collection. correct: applies its corrections to the table; None without any.

    group: `data.group`. findings: what is told when it is read.
    """

    folder: str
    layout: Layout
    correct: Callable[[Table], Table] | None
    group: str
    findings: list[Finding]

    def files(self) -> list[Path]:
        """Return the files that determine its rows."""
        return [*self.layout.files, *([Path(self.folder) / CORRECTIONS] if self.correct else [])]

    def read(self, fraction: Share, is_prior: bool = False) -> Table:
        """Return its table with splits and corrections. is_prior: all rows are for training."""
        table = self.layout.read()
        if is_prior:
            table = replace_column(table, "split", pa.array(["train"] * len(table)))
            fraction = 0.0
        corrected = self.correct(table) if self.correct else table
        if self.group != "none" and len(table) and not is_packed(table) and "group" not in table.column_names:
            groups, findings = open_name("data.validity.groups:group_rows")(table, self.folder, self.group)
            self.findings.extend(findings)
            if groups is not None:
                decided = corrected["group"] if "group" in corrected.column_names else groups
                corrected = replace_column(corrected, "group", pc.coalesce(decided, groups))
        return split_corrected(table, corrected, fraction)


def index_collection(
    root: str,
    *,
    validation_fraction: Share,
    cache: Path,
    on_bad_sidecar: Literal["stop", "skip"] = "stop",
    concepts: Sequence[ConceptConfig] = (),
    corrections: bool = True,
    **tables: Any,
) -> Path:
    """Read a collection, or its concepts, in any layout and return the index: an uncompressed Arrow file in `cache`.

    The index of an unchanged manifest or of unchanged shards is reused; if an image has been removed since, reading it
    reports that. A folder is scanned at each call. An index inside a collection is never used. Files that no reader
    uses are logged at each call. on_bad_sidecar: with `stop`, a script that reads a field refuses its faults.
    corrections: apply the corrections of the collection, if it has any. tables: the names of `TableChoice`.

    Raises UserError (`data.root`, `data.table`, `data.columns`, `data.corrections`).
    """
    cache = own_cache(cache)
    unused = Unused()
    choice = TableChoice(**tables)
    parts = _find_parts(root, concepts, cache, unused, choice, corrections)
    files = [file for part in parts for file in part.files()] if all(part.layout.files for part in parts) else []
    stated = CONCEPT_LIST.dump_json([*concepts])
    settings = [validation_fraction, on_bad_sidecar, tables, stated.decode()]
    key = files_key(files, _INDEX, RULES, *IMAGE_SUFFIXES, *settings)
    target = cache / f"{key}.arrow" if files else None
    if target is not None and (known := map_index(target)) is not None:
        log.debug("data.root: %s is unchanged; using its index", files[0])
        facts = json.loads(known.schema.metadata[FACTS])
        say_unused(facts["unused"], said=facts["said"])
        return target
    rows = _read_parts(parts, concepts, root, validation_fraction)
    rows = list_faults(rows, unused, on_bad_sidecar, fields=())
    rows = exclude_twins(rows) if choice.exclude_copies else rows
    fingerprint = _hash(rows, stated)
    lines = unused.describe()
    say_unused(lines, said=unused.said)
    target = target or cache / f"{fingerprint}_{choice.group}_{_INDEX}.arrow"
    known = map_index(target)
    if known is None or not known.equals(rows):  # the fingerprint lacks the columns of MEASURED
        seen = _hash(rows.filter(pc.not_equal(rows["split"], TEST)), stated)
        findings = [*chain(*(part.findings for part in parts)), *ask(rows, root)]
        facts = {
            "fingerprint": fingerprint,
            "seen": seen,
            "said": unused.said,
            "unused": lines,
            "findings": findings,
            "possible_labels": sorted({*unused.get(POSSIBLE, ())}),
            "concepts": json.loads(stated),
        }
        rows = rows.replace_schema_metadata({FACTS: json.dumps(facts)})
        # Uncompressed, for memory mapping, and in the chunks of the table.
        write_atomically(target, lambda file: write_feather(rows, str(file), "uncompressed", chunksize=len(rows)))
    return target


def _hash(table: Table, stated: bytes) -> str:
    """Return the fingerprint of a table and of the concepts, if there are any."""
    fingerprint = hash_table(table)
    return fingerprint if stated == b"[]" else sha256_text(f"{fingerprint} {stated}")[:16]


def _find_parts(
    root: str, concepts: Sequence[ConceptConfig], cache: Path, unused: Unused, choice: TableChoice, corrections: bool
) -> list[_Part]:
    """Return the folder of each concept, or `root` alone. Raises UserError (`data.root`, `data.concepts.N.path`)."""
    if not concepts:
        return [_find_part(root, cache, unused, choice, corrections)]
    folders = find_folders(root, concepts)
    parts = []
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"data.concepts.{number}.path: {folder!r} is listed twice; merge both, and their repeats")
        with _naming(number):
            parts.append(_find_part(folder, cache, unused, choice, corrections))
    return parts


def _find_part(folder: str, cache: Path, unused: Unused, choice: TableChoice, corrections: bool) -> _Part:
    layout = find_layout(folder, cache, unused, choice)
    correct = None
    if corrections and not is_remote(folder) and os.path.lexists(check_root(folder) / CORRECTIONS):
        correct = open_name("data.layouts.corrections:open_corrections")(check_root(folder), unused)
    return _Part(folder, layout, correct, choice.group, [])


def _read_parts(parts: list[_Part], concepts: Sequence[ConceptConfig], root: str, fraction: Share) -> Table:
    """Return one table. Each concept is split as a collection of its own. Raises UserError."""
    if not concepts:
        return parts[0].read(fraction)
    base = os.path.abspath(root)
    tables = []
    for number, (concept, part) in enumerate(zip(concepts, parts)):
        with _naming(number):
            table = part.read(fraction, concept.is_prior)
        if concept.trigger is not None:  # the caption of rows without a caption and tags
            has_text = has_value(table["caption"]) | has_value(table["tags"])
            captions = pc.if_else(pa.array(has_text), table["caption"], concept.trigger)
            table = replace_column(table, "caption", captions)
        inner = [each.folder for each in parts if each.folder.startswith(os.path.join(part.folder, ""))]
        tables.append(_place(table, number, base, part.folder, inner))
    packed = [is_packed(table) for table in tables]
    if any(packed) and not all(packed):
        one = concepts[packed.index(True)].path
        other = concepts[packed.index(False)].path
        raise UserError(f"data.concepts: {one!r} has shards and {other!r} has files; pack all of them, or none")
    try:
        joined = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise UserError(f"data.concepts: the manifests have a column of several types ({error})") from error
    return build_table(joined)


def _place(table: Table, number: int, base: str, folder: str, inner: Sequence[str]) -> Table:
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


def map_index(arrow: Path) -> Table | None:
    """Map an index; None if it is missing, damaged or has another schema, so that it is made again."""
    with suppress(pa.ArrowException, OSError):
        table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
        if pa.schema(list(table.schema)[: len(SCHEMA)]).equals(SCHEMA):
            return table
    return None
