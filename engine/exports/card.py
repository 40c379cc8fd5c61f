"""What a run's folder says about its weights, for the README.md of an export (models/export/model_card.py)."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import create_model

from engine.exports.weights import Weights
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import KINDS
from models.export.model_card import CardFacts
from utils.config.recipe import flatten, is_free
from utils.config.schema import path_keys
from utils.errors import UserError, about
from utils.io.files import read_json, readable
from utils.record.figures import show_name
from utils.record.logging import get_logger
from utils.record.run_reader import RunReader
from utils.thresholds import PER_TAG, ThresholdTable

log = get_logger(__name__)

_RECIPE = {  # ten lines of a recipe, with `peak learning rate` and `precision`
    "script": "script",
    "model": "model.name",
    "images of an update": "loop.global_batch_size",
    "optimiser": "optim.name",
    "weight decay": "optim.weight_decay",
    "schedule": "schedule.name",
    "average of weights": "loop.ema_decay",
    "seed": "seed",
}
_NO_FIGURES = ("seconds", "step", "epoch")


def collect_facts(
    weights: Weights, run_dir: str | None, thresholds: ThresholdTable | None, more: str | None
) -> CardFacts:
    """Return what is known about weights. more: a file to append to the card. Raises UserError (`card`)."""
    run = weights.run
    images, figures, prefix = _find_figures(weights, Path(run_dir) if run_dir else run and run.path)
    rows = [asdict(row) for row in (thresholds.rows if thresholds else ()) if row.profile != PER_TAG]
    text = ""
    if more is not None:
        with about("card"), readable(Path(more), "Markdown"):
            text = Path(more).read_text(encoding="utf-8")
    facts = CardFacts(weights.title, {images: figures} if figures else {}, rows, more=text)
    return facts if run is None else _add_run(facts, run, weights.metadata, prefix)


def _add_run(facts: CardFacts, run: RunReader, metadata: Mapping[str, Any], prefix: str | None) -> CardFacts:
    """Add recipe, configuration and pictures. prefix: of the pictures of these weights, or None without them."""
    try:
        config = flatten(run.config)
    except UserError as error:  # the weights are whole
        log.warning("README.md: without recipe and pictures: %s", error)
        return facts
    rates = [row["lr"] for row in run.rows if isinstance(row.get("lr"), float)]
    recipe = {name: config.get(key) for name, key in _RECIPE.items()}
    recipe |= {"peak learning rate": max(rates, default=None), "precision": metadata.get("precision")}
    names = {"curves": "curves"}  # without images of the collection
    names |= {} if prefix is None else {name: f"{prefix}{name}" for name in ("samples", "pr_curves", "confusion")}
    files = {show_name(name): run.path / f"plots/{file}.png" for name, file in names.items()}
    pictures = {caption: path for caption, path in files.items() if path.is_file()}
    return CardFacts(**{**vars(facts), "recipe": recipe, "config": _public(config), "pictures": pictures})


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's recipe without paths of a disk; a name on the hub stays."""
    kind = KINDS.get(config.get("task.name"))
    parts = {} if kind is None else {"task": (kind.config, ...), "model": (kind.model, ...)}
    paths = path_keys(create_model("Run", __base__=ImageTrainingConfig, **parts))

    def is_path(key: str, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str) and not text.startswith("hf:")]
        return any(key in paths or os.path.isabs(text) for text in texts)

    return {key: value for key, value in config.items() if not is_free(key) and not is_path(key, value)}


def _find_figures(weights: Weights, folder: Path | None) -> tuple[str, dict[str, float], str | None]:
    """Return a name of the measured images, the figures of these weights, and the prefix of their pictures.

    They are of evaluate.py on `val`, or else of the run's evaluation at the step of these weights.
    """
    metadata, run = weights.metadata, weights.run
    if measured := read_figures(weights, folder):
        images = "other images than the run's" if measured.get("data") else "the validation images"
        return images, _numbers(measured), "evaluate_"
    rows = [row for row in (run.rows if run else ()) if row.get("kind") == "evaluate"]
    averaged = "ema/" if metadata.get("average") else ""
    for row in rows:
        numbers = {name.removeprefix("ema/"): value for name, value in row.items() if name.startswith(averaged)}
        is_same = any(name.startswith("ema/") for name in row) == bool(averaged)
        if row["step"] == metadata.get("step") and is_same:
            return "the validation images, in training", _numbers(numbers), "" if row is rows[-1] else None
    return "", {}, None


def read_figures(weights: Weights, folder: str | Path | None) -> dict[str, Any]:
    """Return the figures of evaluate.py in a run's folder if they are of these weights on `val`, or nothing."""
    try:
        measured = dict(read_json(Path(folder or "") / "metrics.json"))
    except (OSError, ValueError, TypeError):
        return {}
    is_ours = (measured.get("weights_hash"), measured.get("split")) == (weights.metadata.get("weights_hash"), "val")
    return measured if is_ours else {}


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if name not in _NO_FIGURES and math.isfinite(value)}
