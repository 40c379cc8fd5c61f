"""Compare taggers on the tags that all of them know and the images of one collection.

    report = Arena({"outputs/run": ours, "wd-vit-tagger-v3": other}, data, config, runtime, batch_size=32).measure()

A model prepares images as its file states. A comparison is fair only on images that no model was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from data.config import DataConfig
from data.load import load_collection
from data.open import Data, open_images
from data.tags.fields import read_targets, tag_fields
from data.tags.rules import read_rules
from data.tags.tag_index import index_tags
from engine.judging.config import ArenaConfig
from engine.measures.tag_drawings import draw_pr_curves
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagCounts, TagHistograms
from engine.task import Report
from engine.tasks.tagging import CACHE
from engine.update.runtime import Runtime
from models.predictor import Predictor
from utils.errors import UserError, about
from utils.formats.spelling import RATING
from utils.formats.vocabulary import FACTS, Vocabulary, vocabulary_of
from utils.record.logging import log
from utils.record.progress import track

_SLACK = 1e-3  # rounding in fp16 may move probabilities this far beyond 0 and 1
_SHOWN_FIGURES = ("mAP", "macro_f1", "micro_f1", "macro_f1_at_0.35", "micro_f1_at_0.35", "tags")


@dataclass
class Arena:
    """Models by name, the tags that all of them know, and the images with at least one of these tags.

    Raises UserError (`models`, `data.root`, `job...`) if there are no such tags or images.
    """

    models: Mapping[str, Predictor]
    data: DataConfig
    config: ArenaConfig
    runtime: Runtime
    batch_size: int

    def __post_init__(self) -> None:
        with about("models"):
            self._outputs = {}  # of each tag that a model was trained on: others are placeholders (tag_forms.py)
            for name, predictor in self.models.items():
                if not set(FACTS) <= predictor.metadata.keys():
                    raise UserError(f"{name} is no tagger: its metadata have no tags; name only taggers")
                known = vocabulary_of(predictor.metadata)
                self._outputs[name] = {key: output for key, output in known.spelled.items() if known.counts[output]}
        first, *others = self._outputs.values()
        keys = [key for key in first if all(key in other for other in others)]
        if all(category == RATING for category, _ in keys):
            sizes = ", ".join(f"{name} ({len(columns):,} tags)" for name, columns in self._outputs.items())
            raise UserError(
                f"models: except for ratings, no tag has the same category and name in all models: {sizes}; tags "
                "without training images (count 0) are skipped"
            )
        self._shared = Vocabulary.of(keys)  # in the first model's order
        self._collection = load_collection(self.data)
        self._index = index_tags(self._collection, self._shared, read_rules(self.config, "job."), CACHE)
        log.info("the models share %s tags; %s", f"{len(self._shared):,}", self._index.describe(self._shared))

    def measure(self) -> Report:
        """Measure all models. The result does not depend on the number of ranks.

        Tables: `arena`, a row per model, best mAP first; `arena_groups`, all metrics per category; `arena_tags`, the AP
        of each tag. Image: `pr_curves`. Raises UserError (`job.min_support`, `models`).
        """
        rows = []
        groups = []
        wholes = {}
        tags = {}
        for name in self.models:
            scores, images = self._measure(name)
            tables = scores.tables()
            wholes[name] = scores.groups["all"]
            groups += [{"model": name, **row} for row in tables["tag_groups"]]
            shown = {figure: tables["tag_groups"][0][figure] for figure in _SHOWN_FIGURES}
            rows.append({"model": name, **shown, "images": images})
            for row in tables["tags"]:
                columns = {column: row[column] for column in ("tag", "category", "support")}
                tags.setdefault((row["category"], row["tag"]), columns)[name] = row["ap"]
        rows.sort(key=lambda row: -row["mAP"])
        return Report(
            {"tags": len(tags), "images": images, "min_support": self.config.min_support},
            {"arena": rows, "arena_groups": groups, "arena_tags": list(tags.values())},
            {"pr_curves": draw_pr_curves(wholes)},
        )

    def _measure(self, name: str) -> tuple[TagScores, int]:
        """Return a model's scores on the shared tags with enough support, and the number of readable images."""
        predictor = self.models[name]
        shared = self._shared
        outputs = [self._outputs[name][key] for key in shared.columns]
        preprocessing = predictor.preprocessing
        source = open_images(self._collection, self.data, preprocessing)
        data = Data(self._collection, source, self.runtime, seed=0, batch_size=self.batch_size, run_path=None)
        loader = data.prepared(np.flatnonzero(self._index.tagged), tag_fields(self._index), preprocessing)
        histograms = TagHistograms(len(shared))
        for batch in track(loader, len(loader), f"measuring {name}"):
            probs = predictor.predict(batch["images"])[:, outputs]
            if probs.min() < -_SLACK or probs.max() > 1 + _SLACK:
                raise UserError(
                    f"models: {name} outputs {probs.min():.3g} to {probs.max():.3g}, not probabilities; name a file "
                    "whose graph includes the sigmoid, like the WD form"
                )
            targets = read_targets(batch, len(shared))
            logits = torch.from_numpy(probs).float().clamp(0, 1).to(targets.device).logit()
            histograms.add(logits, targets, batch["weight"] > 0)
        counts = histograms.reduce()
        support = counts.histograms[:, 1].sum(1)
        is_frequent = support >= self.config.min_support
        if not is_frequent.any():
            raise UserError(
                f"job.min_support: {self.config.min_support}, but the most frequent shared tag is on only "
                f"{int(support.max())} images; set a lower value, or add images"
            )
        frequent = TagCounts(*(tensor[is_frequent] for tensor in (counts.histograms, counts.scores, counts.hits)))
        vocabulary = Vocabulary.of(compress(shared.columns, is_frequent.tolist()))
        images = counts.histograms.sum((1, 2)).max()  # an unknown label does not count
        return TagScores(frequent, vocabulary), int(images)
