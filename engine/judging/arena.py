"""Compare taggers on the images of one collection: on the tags that all of them know, and on those that some know.

    report = compare_taggers({"outputs/run": ours, "wd-vit-tagger-v3": other}, config)

A model prepares images as its file states. A comparison is fair only on images that no model was trained on.
"""

from collections.abc import Mapping
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from data.layouts.table import show_some
from data.tags.fields import read_targets, tag_fields
from data.tags.rules import read_rules
from data.tags.tag_index import TagIndex, index_tags
from engine.judging.config import Compare
from engine.judging.measured import Measured
from engine.measures.tag_scores import OLD, TagScores
from engine.measures.tags import TagCounts, TagHistograms
from engine.task import Report
from engine.tasks.tagging import CACHE
from utils.errors import UserError
from utils.formats.spelling import RATING
from utils.formats.thresholds import DEFAULT_LOGIT
from utils.formats.vocabulary import Vocabulary
from utils.io.files import Json
from utils.ranks import distributed
from utils.record.logging import log
from utils.record.progress import track

_CHANGED = 10  # tags that lost most, and tags that gained most
_IMAGES = 12  # of such a tag
_SAYS = ("right", "wrong", "missed")  # of an error: 0, 1, -1


def compare_taggers(models: Mapping[str, Measured], config: Compare) -> Report:
    """Measure taggers, by name. The result does not depend on the number of ranks.

    Tables: `arena`, a row per model on the tags that all know, best mAP first; `arena_groups`, all metrics of these
    tags (`old`), of the others (`new`), and of the model's tags by category; `arena_tags`, the AP of each tag, none for
    a model that lacks it; `arena_changes` and `arena_images` (`_find_changes`).
    Raises UserError (`models`, `data.root`, `job...`) if no tag that all know is on enough images.
    """
    outputs = []
    for name, opened in models.items():
        if opened.weights.kind.output != "tags":
            raise UserError(f"models: {name} is no tagger; name only taggers")
        known = opened.weights.task.vocabulary
        outputs.append({key: output for key, output in known.spelled.items() if known.counts[output]})
    every = Vocabulary.of(dict.fromkeys(chain(*outputs)))
    index = index_tags(opened.data.collection, every, read_rules(config, "job."), CACHE)
    images = opened.rows[index.tagged[opened.rows]]
    is_judged = index.count(images, len(every)) >= config.min_support
    judged = Vocabulary.of(compress(every.columns, is_judged))
    is_shared = np.array([key[0] != RATING and all(key in known for known in outputs) for key in judged.columns])
    if not is_shared.any():
        raise UserError(
            f"models: except for ratings, no tag that all know is on job.min_support={config.min_support} of the "
            f"{len(images):,} images; set a lower value, or name images or taggers that share tags (of a count above 0)"
        )
    rows = []
    groups = []
    errors = {}
    tags = [{} for _ in judged.names]
    for (name, opened), known in zip(models.items(), outputs):
        columns = [known.get(key, -1) for key in judged.columns]
        with opened.runtime.autocast():
            counts, errors[name] = _measure(opened, images, index, columns, is_judged)
        scores = TagScores(counts, judged, is_shared)
        rows.append({"model": name, **scores.groups[OLD].row()})
        tables = scores.tables()
        groups += [{"model": name, **row} for row in tables["tag_groups"]]
        for tag, row in zip(tags, tables["tags"]):
            tag |= {"tag": row["tag"], "category": row["category"], name: row["ap"]}
        log.info("%s lacks %s", name, show_some([*compress(judged.names, np.isnan(scores.ap))]) or "no tag")
    rows.sort(key=lambda row: -row["mAP"])
    changes = _find_changes(tags, errors, opened.data.collection.table["path"])
    return Report(
        {"tags": int(is_shared.sum()), "images": len(images), "min_support": config.min_support},
        {"arena": rows, "arena_groups": groups, "arena_tags": tags, **changes},
    )


def _measure(
    opened: Measured, images: np.ndarray, index: TagIndex, columns: list[int], is_judged: np.ndarray
) -> tuple[TagCounts, np.ndarray]:
    """Return the counts of the judged tags, and the errors at 0.35 of all images, int8 [rows, T]: see _SAYS.

    columns: the outputs of these tags; -1: none, so that its labels count as unknown.
    """
    task = opened.weights.task.to(opened.runtime.device)
    loader = opened.data.prepared(images, tag_fields(index), opened.weights.setup.preprocessing)
    lacks = torch.tensor(columns, device=opened.runtime.device) < 0
    histograms = TagHistograms(len(columns))
    errors = torch.zeros(len(index.tagged), len(columns), dtype=torch.int8, device=opened.runtime.device)
    for batch in track(loader, len(loader), f"measuring {opened.weights.path}"):
        logits = task.predict(batch)[:, columns]
        targets = read_targets(batch, len(is_judged))[:, is_judged].masked_fill(lacks, torch.nan)
        valid = batch["weight"] > 0
        histograms.add(logits, targets, valid)
        wrong = (logits >= DEFAULT_LOGIT).float() - targets
        errors[batch["sample_id"][valid]] = wrong.nan_to_num().char()[valid]
    return histograms.reduce(), distributed.all_reduce_sum(errors).cpu().numpy()


def _find_changes(tags: list[Json], errors: Mapping[str, np.ndarray], paths: Any) -> dict[str, list[Json]]:
    """Return the tags whose AP differs most between the first and the last model, and images on which one of both errs.

    Tables: `arena_changes`, the greatest loss first; `arena_images`.
    """
    (first, before), *_, (last, after) = [*errors.items()] * 2
    both = [column for column, tag in enumerate(tags) if None not in (tag[first], tag[last])]
    gains = sorted((tags[column][last] - tags[column][first], column) for column in both)
    changes = []
    images = []
    for gain, column in gains[:_CHANGED] + gains[_CHANGED:][-_CHANGED:]:
        tag = tags[column]
        changes.append({**tag, "gain": gain})
        for row in np.flatnonzero(before[:, column] != after[:, column])[:_IMAGES].tolist():
            says = {first: _SAYS[before[row, column]], last: _SAYS[after[row, column]]}
            images.append({"tag": tag["tag"], "gain": gain, "path": paths[row].as_py(), **says})
    return {"arena_changes": changes, "arena_images": images}
