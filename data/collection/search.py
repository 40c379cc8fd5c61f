"""Find rows of a collection by a text of terms. Columns are compared as a whole, so a million rows take a moment.

    search = Search(collection)
    search.find('1girl -hat character:* split=val caption:"red house" width>=512 copies>1')       rows, int64 [n]
    search.count(rows, "tags")                                  {"1girl": 512, ...}, the most frequent first

A term is a word or COLUMN OPERATOR VALUE. A word is a tag (`*` stands for any text). If no image has that tag, the
search looks for the word in names, labels, tags and captions. A `-` before a term excludes its rows. `:` finds a part
of a text, `=` the whole text. Numbers also have < <= > >=; a list of tags is compared by its length. `OR` between terms
finds what either side accepts. Beside the columns of the manifest there are `aspect` (width / height) and `copies` (how
many images are equal or similar, itself included).
"""

import operator
import re
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from data.collection.collection import Collection
from data.collection.split import FINGERPRINTS, lead_rows
from data.collection.tag_rows import NamedTags
from data.layouts.table import TAG_LISTS, count_values
from data.layouts.values import FIELDS
from utils.errors import UserError, about
from utils.formats.spelling import PREFIXES, parse_tag

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_TERM = re.compile(rf"(-?)(?:({_QUOTED}|\w[\w.-]*)(<=|>=|[:=<>]))?({_QUOTED}|\S+)")
_WORDS = ("path", "label", "caption")  # the columns in which a word is looked for, beside tags
_COMPARE = {
    ":": operator.eq, "=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def quote_value(value: str) -> str:
    """Return a value as it is written in a term."""
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _unquote(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if is_quoted else value


class Search:
    """Find the rows of a collection by terms. Slow intermediate results are cached."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._table = collection.table
        self._lists = cache(lambda name: NamedTags.of(self._table[name]))
        self.leads = cache(lambda: lead_rows(self._table, FINGERPRINTS))
        self.columns = list(self._table.column_names)
        filled = [name for name in self.columns if self._table[name].null_count < len(collection)]
        self.columns += ["aspect"] if {"width", "height"} <= {*self.columns} else []
        self.columns += ["copies"] if {*FINGERPRINTS} & {*filled} else []

    def find(self, text: str) -> ndarray:
        """Return the rows that all terms accept; a term of copies puts them side by side. Raises UserError."""
        sides: list[list[tuple[str, ...]]] = [[]]
        for term in _TERM.findall(text):
            if term == ("", "", "", "OR"):
                sides.append([])
            else:
                sides[-1].append(term)
        if len(sides) > 1 and not all(sides):
            raise UserError(f"{text}: OR needs a term on both of its sides")
        accepted = [self._accepts_all(terms) for terms in sides]
        rows = np.flatnonzero(np.logical_or.reduce(accepted))
        return rows[np.argsort(self.leads()[rows], kind="stable")] if "copies" in self.names(text) else rows

    def names(self, text: str) -> set[str]:
        """Return the columns that terms read; a word reads `tags`."""
        names = {_unquote(name) for _, name, *_ in _TERM.findall(text)}
        return {name if name in self.columns else "tags" for name in names}

    def count(self, rows: ndarray, name: str) -> dict[str, int]:
        """Count the values, or tags, of a column of texts over some rows, the most frequent first."""
        if name not in TAG_LISTS:
            return count_values(self._table[name].take(rows))
        tags = self._lists(name)
        counts = tags.count(rows, len(tags.names))
        return {tags.names[number]: int(counts[number]) for number in np.argsort(-counts) if counts[number]}

    def _accepts_all(self, terms: list[tuple[str, ...]]) -> ndarray:
        """Return whether each row matches all terms, bool [N]."""
        chosen = np.ones(len(self.collection), bool)
        for minus, name, sign, value in terms:
            chosen &= self._accepts(_unquote(name), sign, _unquote(value)) != bool(minus)
        return chosen

    def _accepts(self, name: str, sign: str, value: str) -> ndarray:
        """Return whether each row has a tag, or a value in a column, bool [N]."""
        if sign == ":" and name in {*TAG_LISTS} & {*self.columns}:
            return self._has_tag(name, value)
        if name not in self.columns:
            if not sign:  # a word: a tag, or if no row has it, a part of a text
                has = self._has_tag("tags", value)
                texts = [self._has_tag("tags", f"*{value}*"), *(self._accepts(each, ":", value) for each in _WORDS)]
                return has if has.any() else np.logical_or.reduce(texts)
            if sign == ":" and name in PREFIXES:
                return self._has_tag("tags", f"{name}{sign}{value}")
            raise UserError(
                f"{name}{sign}{value}: no such column; there are {', '.join(self.columns)}. A tag with a colon needs "
                "quotes. prepare.py job=manifest adds width, height, copies, and the reason why an image is unreadable"
            )
        if (numbers := self._numbers(name)) is not None:
            try:
                return _COMPARE[sign](numbers, float(value))
            except ValueError:
                raise UserError(f"{name}{sign}{value}: {name} has numbers; write one") from None
        if sign not in (":", "="):
            raise UserError(f"{name}{sign}{value}: {name} has texts; use {name}:{value} or {name}={value}")
        column = self._table[name]
        matches = pc.equal(column, value) if sign == "=" else pc.match_substring(column, value, ignore_case=True)
        return matches.fill_null(False).to_numpy()

    def _has_tag(self, name: str, value: str) -> ndarray:
        tags = self._lists(name)
        wanted = parse_tag(value)
        has = np.zeros(len(self.collection), bool)
        is_name = re.compile(".*".join(map(re.escape, wanted.name.split("*")))).fullmatch
        parsed = map(parse_tag, tags.names)
        chosen = [wanted.category in (None, tag.category or 0) and bool(is_name(tag.name)) for tag in parsed]
        has[tags.owners()[np.array(chosen, bool)[tags.ids]]] = True
        return has

    def _numbers(self, name: str) -> ndarray | None:
        """Return a column as numbers, [N], NaN if unknown; None for a column of texts."""
        if name in TAG_LISTS:
            return pc.list_value_length(self._table[name]).to_numpy()
        if name in self._table.column_names:  # also if a manifest has a column aspect or copies
            return None if pa.types.is_string(self._table[name].type) else self.collection.column(name)
        if name == "copies":
            return np.bincount(self.leads(), minlength=len(self.collection))[self.leads()]
        with np.errstate(all="ignore"):  # sides of 0
            return self.collection.column("width") / self.collection.column("height")


def find_rows(collection: Collection, text: str, key: str) -> ndarray:
    """Return the rows that terms find, ascending. Raises UserError (`key`), also for bad sidecars that they read."""
    search = Search(collection)
    if fields := search.names(text).intersection(FIELDS):
        collection.refuse_faults(*fields)
    with about(key):
        return np.sort(search.find(text))
