"""Concepts: folders that make one collection, each with its own repeats or share, captions and weight.

A concept is an index per row, the column CONCEPT. `data.concepts` is the table; the index of a collection keeps it
(data/collection/index.py joins the folders).
"""

import os
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy import ndarray
from pydantic import model_validator

from data.layouts.folders import REPEATS
from data.layouts.names import CSV, JSONL, PARQUET, POSTS, is_image_name, is_passed_over, is_remote
from data.layouts.walk import check_root, find_one, list_folder
from utils.config.bounds import Count, Fraction, Positive
from utils.config.schema import PathText, Strict
from utils.errors import UserError
from utils.io.names import find_path
from utils.record.logging import log

CONCEPT = "concept"  # a column: the index of a row's concept


class ConceptConfig(Strict):
    """A folder of images, in any layout of docs/collections.md.

    path: below data.root, or anywhere; an image in nested concepts belongs to the inner concept. repeats: how often an
    epoch names each image (null: once); share: of an epoch, instead of repeats. Priors without a share make up half of
    the positions without a share; `repeats` weighs them against each other. trigger: the caption of an image without a
    caption and tags. captions: keys of task.captions with other values. mask: null: as the task says. is_prior: images
    that preserve what the model knows; they are not validated, and have a loss of their own. weight: a factor of the
    loss.
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

    def without_trigger(self) -> Self:
        """Return the concept for a run whose captions have a trigger; priors get none."""
        change = {"captions": {**self.captions, "prefix": ""}} if self.is_prior else {"trigger": None}
        return self.changed(change)


def find_repeats(root: str) -> list[ConceptConfig]:
    """Return the folders `10_name` of sd-scripts as concepts: all folders of the root, or those in its img and reg.

    The list is empty if another folder or an image is among them. Folders `0_name` are skipped. Folders of reg are
    priors. Raises UserError (`data.root`) if all folders are skipped.
    """
    if is_remote(root) or find_one(folder := check_root(root), (PARQUET, JSONL, CSV, *POSTS)):
        return []
    parts = [part for part in ("img", "reg") if (folder / part).is_dir()] if (folder / "img").is_dir() else [""]
    concepts = []
    skipped = []
    for part in parts:
        for each in sorted(list_folder(folder / part), key=lambda each: each.name):
            if is_passed_over(each.name) or not (each.is_dir() or is_image_name(each.name)):
                continue
            match = REPEATS.fullmatch(each.name)
            if match is None or not each.is_dir():
                return []
            path = os.path.join(part, each.name)
            if repeats := int(match[1]):
                concepts.append(ConceptConfig(path=path, repeats=repeats, trigger=match[2], is_prior=part == "reg"))
            else:
                skipped.append(path)
    if names := ", ".join(map(repr, skipped)):
        if not concepts:
            raise UserError(
                f"data.root: 0 repeats leave out all of {root}: {names}; rename one, or set data.concepts=[]"
            )
        log.info("data.root: 0 repeats leave out %s", names)
    return concepts


def find_folders(root: str, concepts: Sequence[ConceptConfig]) -> list[str]:
    """Return the absolute folder of each concept."""
    base = os.path.abspath(root)
    return [find_path(os.path.abspath(os.path.join(base, each.path))) for each in concepts]


def count_positions(concepts: Sequence[ConceptConfig], counts: ndarray) -> ndarray:
    """Return how many positions of an epoch each concept has, int64 [C]. counts: its samples, [C].

    repeats: that many for each sample. Priors then get as many positions as all other samples, by fewer samples or by
    further rounds. share: this part of the epoch. If no concept has repeats, only the ratio of the shares counts,
    and the epoch is long enough for every sample to occur. Raises UserError (`data.concepts`).
    Source: kohya-ss/sd-scripts:library/train_util.py, DreamBoothDataset. Differs: the positions after whole
    rounds are divided among the priors; there the first folder gets them.
    """
    shares = np.array([concept.share or 0.0 for concept in concepts])
    fixed = counts * [0 if concept.share is not None else concept.repeats or 1 for concept in concepts]
    priors = np.array([concept.is_prior and concept.share is None for concept in concepts])
    if others := fixed[~priors].sum():
        rounds = share_out(counts * priors, max(others - fixed[priors].sum(), 0))
        fixed[priors] = (share_out(fixed * priors, min(others, fixed[priors].sum())) + rounds)[priors]
    if len(without := np.flatnonzero((shares > 0) & (counts == 0))):
        path = concepts[without[0]].path
        raise UserError(f"data.concepts.{without[0]}.share: no training image of {path!r} can have it; remove it")
    total = shares.sum()
    most = 1.0 if fixed.any() else np.inf
    if total >= most or (total == 0 and not fixed.any()):
        raise UserError(f"data.concepts: the shares sum to {total:g}; above 0 is allowed, beside repeats below 1")
    if fixed.any():
        return fixed + share_out(shares, round(fixed.sum() / (1 - total) * total))
    used = shares > 0
    return share_out(shares, int(np.ceil((counts[used] * total / shares[used]).max() - 1e-9)))


def share_out(weights: ndarray, count: int) -> ndarray:
    """Divide `count` by weights into whole numbers, int64, by largest remainders; of equal ones, the first."""
    exact = weights * (count / (weights.sum() or 1.0))
    whole = np.floor(exact + 1e-9).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: count - whole.sum()]] += weights.any()
    return whole
