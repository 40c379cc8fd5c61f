"""job=duplicates: find images that show one picture, exclude all but one, and name those that contradict it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data.collection.duplicates import are_alike, group_duplicates, read_thumbnails
from data.config import DataConfig
from data.layouts.table import TEST
from data.layouts.walk import check_root
from data.open import load_collection
from data.tags.spellings import fold
from data.tools.exclude import Finder, read_reasons
from data.tools.measure import FileFacts, measure_files
from data.tools.tool import list_files, refuse_shards, save_report
from utils.formats.spelling import parse_rating, parse_tag
from utils.formats.vocabulary import RATING
from utils.record.logging import get_logger

log = get_logger(__name__)

_TEXTS = ("caption", "tags", "label")
_SHOWN = 5  # tags in a reason

Claims = frozenset[tuple[str, str]]


class Image(NamedTuple):
    """An image of a group: its row of the collection, its facts, and what it says of the picture (`read_claims`)."""

    path: str
    row: Mapping[str, Any]
    facts: FileFacts
    claims: Claims

    @property
    def rank(self) -> tuple[Any, ...]:
        """The order in which images are kept: tests, then most tags, most texts, most pixels, most bytes."""
        texts = sum(bool(self.row[name]) for name in _TEXTS)
        pixels = (self.facts.width or 0) * (self.facts.height or 0)
        return self.row["split"] != TEST, -len(self.claims), -texts, -pixels, -self.row["size"], self.path


class Duplicates(Finder):
    """Write a table of groups of duplicates, and exclude or list all images but one of each; write column `group`.

    One of the test split is kept before others, then the one with a label, a rating and the most tags, then the one
    with a caption, then the largest. Images of the test split stay, and so do those with a label, rating or tag
    that the kept one lacks: these are listed apart. match: near: one picture in several sizes, formats or brightnesses,
    or mirrored; exact: equal bytes.
    """

    name: Literal["duplicates"]
    match: Literal["near", "exact"]

    def choose(self, data: DataConfig) -> tuple[dict[str, str], dict[str, int]]:
        """Return all images except one of each group. Raises UserError (`data.root`, `job.report`)."""
        root = check_root(data.root)
        table = load_collection(data).table
        refuse_shards(root, table)
        rows = table.select(["path", "size", "weight", "split", "rating", *_TEXTS]).to_pylist()
        found = {  # without images that other jobs exclude: a group must not keep one of those
            row["path"]: row for row, why in zip(rows, read_reasons(table))
            if row["weight"] or not why or why.startswith(f"{self.name}: ")
        }  # fmt: skip
        facts = dict(zip(found, measure_files(root, list(found), data.max_pixels)))
        groups = find_groups(facts, self.match)
        numbers: dict[str, int] = {}
        reasons: dict[str, str] = {}
        others: dict[str, str] = {}
        rows = []
        for number, group in enumerate(groups, start=1):
            images = [Image(path, found[path], facts[path], read_claims(found[path])) for path in group]
            excluded, contrary = sort_out(sorted(images, key=lambda image: image.rank), is_exact=self.match == "exact")
            reasons |= excluded
            others |= contrary
            for path in sorted(group, key=excluded.__contains__):
                size = {"width": facts[path].width, "height": facts[path].height}
                rows.append({"group": number, "path": path, "kept": path not in excluded, **size})
                numbers[path] = -number  # negative, because those of job=manifest count from 0
        figures = {"groups": len(groups), "images in them": len(rows), "that say something else": len(others)}
        save_report(Path(self.report) / self.name, str(root), figures, {"groups": rows}, {})
        listing = list_files(self.report, "same_picture", others)
        if others:
            log.warning(
                "%s images show the picture of another one and have another label, rating or tag; they stay. %s lists "
                "them: put right what is wrong, then run job=manifest and this job again", f"{len(others):,}", listing,
            )  # fmt: skip
        return reasons, numbers


def sort_out(images: Sequence[Image], *, is_exact: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return why images of a group are excluded, and what those say that contradict a kept one; both by path.

    images: in the order of `rank`. An image is excluded if a kept one is alike and says all that it says. In a long
    chain the ends are not alike, so several may be kept.
    """
    kept = [image for image in images if image.row["split"] == TEST]
    excluded = {}
    contrary = {}
    for image in images:
        if image in kept:
            continue
        alike = kept if is_exact else _find_alike(image, kept)
        wider = [other for other in alike if image.claims <= other.claims]
        if wider:
            excluded[image.path] = f"a duplicate: {wider[0].path} is kept"
            continue
        if alike:
            there = _show(alike[0].claims - image.claims)
            contrary[image.path] = f"here {_show(image.claims - alike[0].claims)}; in {alike[0].path} {there}"
        kept.append(image)
    return excluded, contrary


def _find_alike(image: Image, kept: Sequence[Image]) -> list[Image]:
    """Return the kept images of a group that show an image's picture; without thumbnails, their bytes are equal."""
    thumbnails = [other.facts.thumbnail for other in kept]
    if image.facts.thumbnail is None or not kept:
        return list(kept)
    own = np.repeat(read_thumbnails([image.facts.thumbnail]), len(kept), axis=0)
    return [other for other, alike in zip(kept, are_alike(own, read_thumbnails(thumbnails))) if alike]


def read_claims(row: Mapping[str, Any]) -> Claims:
    """Return what a row says of its picture: label, rating and tags, whose spelling makes no difference."""
    stated = {("label", row["label"]), ("rating", parse_rating(row["rating"] or ""))}
    for tag in map(parse_tag, row["tags"]):
        stated.add(("rating", parse_rating(tag.name)) if tag.category == RATING else ("tag", fold(tag.name)))
    return frozenset(claim for claim in stated if claim[1])


def _show(claims: Claims) -> str:
    shown = [f"{kind} {name}" for kind, name in sorted(claims)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "") or "nothing more"


def find_groups(facts: Mapping[str, FileFacts], match: str) -> list[list[str]]:
    """Return the paths of each group with at least two images, the largest group first.

    match: near: alike, or equal bytes without pixels; exact: equal bytes.
    """
    keys: dict[str, int | str | None] = {path: fact.sha256 for path, fact in facts.items()}
    drawn = {path: fact.thumbnail for path, fact in facts.items() if fact.thumbnail is not None}
    if match != "exact":
        keys |= zip(drawn, group_duplicates(list(drawn.values())).tolist())
    members: dict[int | str, list[str]] = {}
    for path, key in keys.items():
        if key is not None:
            members.setdefault(key, []).append(path)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))
