"""Compare taggers, ours and others', on the tags that all of them know, over the images of one collection.

    models = [Entrant.of("outputs/run", predictor), Entrant.of("wd-vit-tagger-v3", other)]
    report = Arena(models, data, config, runtime, batch_size=32).measure()

Every model prepares images as its file states. Only images that no model was trained on compare them.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from data.batch import multi_hot
from data.config import DataConfig, TagRulesConfig
from data.loader import EvaluationStream
from data.open import Data, load_collection, open_images
from data.tags.index import describe_report, index_tags
from data.tags.names import parse_tag
from data.tags.rules import read_rules
from engine.measures.drawings import draw_pr_curves
from engine.measures.means import Means
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagCounts, TagHistograms
from engine.runtime import Runtime
from engine.task import Report
from engine.tasks.tagging import CACHE, TagFields
from models.predictor import Predictor
from utils.canvas import background_of
from utils.config.bounds import Count
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.vocabulary import FACTS, RATING, Vocabulary, category_name, vocabulary_of

log = get_logger(__name__)

_SLACK = 1e-3  # of probabilities beyond 0 and 1, as fp16 rounds them
_SHOWN = ("mAP", "macro_f1", "micro_f1", "macro_f1_at_0.35", "micro_f1_at_0.35", "tags")


class ArenaConfig(TagRulesConfig):
    """min_support: the images that a tag needs to be compared."""

    min_support: Count


class Entrant(NamedTuple):
    """A model as it was named, what predicts with it, and the output of each (category, name) that it knows."""

    name: str
    predictor: Predictor
    outputs: dict[tuple[int, str], int]

    @classmethod
    def of(cls, name: str, predictor: Predictor) -> Self:
        """Return a model by its name. Raises UserError (`models`) where it is no tagger."""
        if not set(FACTS) <= predictor.metadata.keys():
            raise UserError(f"models: {name} is no tagger: it states no tags; name taggers alone")
        return cls(name, predictor, known_outputs(vocabulary_of(predictor.metadata)))


class Arena:
    """Models, the tags that all of them know, and the images that have such a tag.

    Raises UserError (`models`, `data.root`, `arena...`) where they have none in common.
    """

    def __init__(
        self, models: Sequence[Entrant], data: DataConfig, config: ArenaConfig, runtime: Runtime, batch_size: int
    ) -> None:
        self._data, self._runtime, self._batch_size, self._min_support = data, runtime, batch_size, config.min_support
        self._models, self._shared = models, share_tags(models)
        self._collection = load_collection(data)
        self._index = index_tags(self._collection, self._shared, read_rules(config, "arena."), CACHE)
        log.info("the models share %s tags; %s", f"{len(self._shared):,}", describe_report(self._index.report))

    def measure(self) -> Report:
        """Measure all models, the same on any number of ranks.

        Tables: `arena`, a row for each model, the best mAP first; `arena_groups`, all figures of each category;
        `arena_tags`, the AP of each tag. Image: `pr_curves`. Raises UserError (`arena.min_support`, `models`).
        """
        rows, figures, wholes, tags = [], [], {}, {}
        for model in self._models:
            scores, images = self._measure(model)
            whole = wholes[model.name] = scores.groups["all"]
            rows.append({"model": model.name, **{name: whole.row()[name] for name in _SHOWN}, "images": images})
            names = dict.fromkeys(["all", *map(category_name, scores.vocabulary.categories)])
            figures += [{"model": model.name, **scores.groups[name].row()} for name in names]
            for row in scores.tables()["tags"]:
                kept = {name: row[name] for name in ("tag", "category", "support")}
                tags.setdefault((row["category"], row["tag"]), kept)[model.name] = row["ap"]
        rows.sort(key=lambda row: -row["mAP"])
        return Report(
            {"tags": len(tags), "images": images, "min_support": self._min_support},
            {"arena": rows, "arena_groups": figures, "arena_tags": list(tags.values())},
            {"pr_curves": draw_pr_curves(wholes)},
        )

    def _measure(self, model: Entrant) -> tuple[TagScores, int]:
        """Return the scores of the shared tags with enough support, and the number of images that could be read."""
        shared, outputs = self._shared, [model.outputs[key] for key in self._shared.columns]
        is_rating = torch.tensor(shared.categories, device=self._runtime.device) == RATING
        means, histograms, loader = Means(), TagHistograms(len(shared)), self._load(model.predictor.preprocessing)
        for batch in track(loader, len(loader), f"measuring {model.name}"):
            found = model.predictor.predict(batch["images"])[:, outputs]
            if found.min() < -_SLACK or found.max() > 1 + _SLACK:
                raise UserError(
                    f"models: {model.name} gives {found.min():.3g} to {found.max():.3g}, not probabilities; name a "
                    "file with the sigmoid in its graph, as the WD form has it"
                )
            targets = multi_hot(batch["tags"], batch["tags_offsets"], len(shared))
            logits = torch.from_numpy(found).float().clamp(0, 1).to(targets.device).logit()
            valid, known = batch["weight"] > 0, batch["rating_known"][:, None] | ~is_rating
            histograms.add(logits, targets, valid, known)
            means.add({}, valid)
        counts = histograms.reduce()
        support = counts.histograms[:, 1].sum(1)
        kept = support >= self._min_support
        if not kept.any():
            raise UserError(
                f"arena.min_support: {self._min_support}, and the most frequent tag that the models share is on "
                f"{int(support.max())} of the images; set a lower one, or give more images"
            )
        chosen = TagCounts(counts.histograms[kept], counts.scores[kept], counts.hits[kept])
        vocabulary = Vocabulary.of(compress(shared.columns, kept.tolist()))
        return TagScores(chosen, vocabulary), int(means.reduce()["samples"])

    def _load(self, stated: Mapping[str, Any]) -> EvaluationStream:
        """Return a loader of the images that have a tag, as a model's preprocessing prepares them."""
        background = background_of(stated) if self._data.background is None else self._data.background
        config = self._data.model_copy(update={"icc": self._data.icc or stated.get("icc", False)})
        source = open_images(
            self._collection, config, stated["channels"], background, shortest_px=stated.get("shortest_px")
        )
        data = Data(self._collection, source, self._runtime, seed=0, batch_size=self._batch_size, run_path=None)
        return data.prepared(np.flatnonzero(self._index.tagged), TagFields(self._index, None), stated)


def known_outputs(vocabulary: Vocabulary) -> dict[tuple[int, str], int]:
    """Return the output of each tag that a model was trained on, by (category, name as we spell it).

    A tag of no training image only fills a place (models/export/tag_forms.py).
    """
    keys = [(category, parse_tag(name).name) for category, name in vocabulary.columns]
    return {key: output for output, (key, count) in enumerate(zip(keys, vocabulary.counts)) if count}


def share_tags(models: Sequence[Entrant]) -> Vocabulary:
    """Return the tags that all models know, in the order of the first. Raises UserError (`models`) without any."""
    keys = [key for key in models[0].outputs if all(key in other.outputs for other in models)]
    if all(category == RATING for category, _ in keys):
        sizes = ", ".join(f"{model.name} ({len(model.outputs):,} tags)" for model in models)
        raise UserError(
            f"models: no tag beside ratings has the same category and name in all of them: {sizes}; tags on no "
            "training image (count 0) are left out"
        )
    return Vocabulary.of(keys)
