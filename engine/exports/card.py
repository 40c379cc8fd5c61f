"""README.md of an export: front matter for the hub, and what is known of the weights and their run.

An unknown fact has no line. Texts may be a stranger's: they are shown as code.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model

from engine.exports.weights import Weights
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import KINDS
from models.interop import snippets
from models.interop.metadata import base_model, dict_of, label_names, licence_of
from models.outputs import OUTPUTS
from utils.config.recipe import flatten, is_free
from utils.config.schema import path_keys
from utils.errors import UserError
from utils.formats.thresholds import PER_TAG, ThresholdTable
from utils.io.files import read_json, write_json
from utils.io.safe_text import code_span, hide_secrets_in, safe_lines
from utils.record.figures import COUNTS, interval, show_cell, show_interval, show_name, show_rows
from utils.record.logging import get_logger
from utils.record.run_reader import RunReader

log = get_logger(__name__)

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name
_PICTURES = "pictures"  # the folder of a card's pictures
_LIBRARIES = {  # of formats, as the hub names them
    "timm": "timm", "wd_repository": "timm", "transformers": "transformers", **dict.fromkeys(snippets.SDXL, "diffusers")
}  # fmt: skip
# Licences that the hub knows by name; another one is `other`, with its name.
_LICENCES = re.compile(
    r"apache-2\.0|mit|(bigscience-|creativeml-|bigcode-)?openrail(\+\+|-m)?|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0"
    r"|[al]?gpl-[23]\.[01]|bsd-[23]-clause|unlicense|wtfpl|gemma|llama[23]|unknown|other"
)
_SHOWN_NAMES = 100  # classes or tags in a card
_LIMITS = {
    "classes": "It always answers with one of its classes, also for an image of none of them.",
    "tags": "It knows no other tags, and a tag that it does not give may still fit the image.",
    "features": "Its outputs are features for further training or search; they name nothing.",
    None: "Its pictures show what its training images and the base model show, with their faults.",
}
_RECIPE = {  # ten lines of a recipe, with `peak learning rate` and `precision`
    "script": "script",
    "model": "model.name",
    "images of an update": "loop.batch_size",
    "optimiser": "optim.name",
    "weight decay": "optim.weight_decay",
    "schedule": "schedule.name",
    "average of weights": "loop.ema_decay",
    "seed": "seed",
}
_NO_FIGURES = ("seconds", "step", "epoch")


def write_card(
    weights: Weights, folder: Path, form: str, file: str, *, run_dir: str | None = None,
    thresholds: ThresholdTable | None = None, about: Mapping[str, str | None] | None = None, more: str = "",
) -> None:  # fmt: skip
    """Write README.md and its pictures. file: the exported file, in format `form`.

    about: facts that the user gives, by name. more: Markdown to append.
    """
    metadata, run, prompts = weights.metadata, weights.run, _prompts(weights.metadata)
    images, figures, prefix = _find_figures(weights, Path(run_dir) if run_dir else run and run.path)
    lines = [f"# {code_span(weights.title)}, format {form}", "", *_list(about or {}), *_list_names(metadata)]
    if "preprocessing" in metadata:
        lines += ["Preprocessing of the images in training:", "", *_list(metadata["preprocessing"])]
    if program := snippets.program(form, metadata, file, base_model(metadata)):
        lines += ["## Use", "", program, ""]
    trained_on = {name.replace("_", " "): value for name, value in dict_of(metadata, "trained_on").items()}
    known = {name: value for name, value in trained_on.items() if isinstance(value, int | str)}
    recipe, config = ({}, {}) if run is None else _read_recipe(run, metadata)
    lines += ["## Training", "", *_list({**known, **recipe, "step of these weights": metadata.get("step")})]
    if config:
        values = [f"{key}={json.dumps(value)}" for key, value in config.items()]
        lines += ["<details><summary>Configuration</summary>", "", "```", *values, "```", "", "</details>", ""]
    if figures:
        shown = [
            f"- {name}: {show_cell(value)}{show_interval(interval(name, figures))}" for name, value in figures.items()
        ]
        lines += ["## Results", "", f"Measured on {images}:", "", *shown, "", "Other intervals are not computed.", ""]
    if rows := [asdict(row) for row in (thresholds.rows if thresholds else ()) if row.profile != PER_TAG]:
        fitted = "Thresholds, fitted to one half of the images of their calibration and measured on the other:"
        lines += [fitted, "", "```", show_rows(rows), "```", ""]
    for caption, path in _find_pictures(run, prefix).items() if config else ():
        (folder / _PICTURES).mkdir(exist_ok=True)
        (folder / _PICTURES / path.name).write_bytes(path.read_bytes())
        lines += [f"![{caption}]({_PICTURES}/{path.name})", ""]
    lines += [f"- {code_span(prompt)}" for prompt in prompts] + [""]
    hold = "- The figures and examples hold for images like those it was trained on; measure it on yours."
    lines += ["## Limits", "", f"- {_LIMITS[metadata['output']]}", hold, ""]
    lines += ["## Licence", "", *_describe_licence(metadata)]
    front = _front_matter(form, metadata, prompts)
    if "pipeline_tag" in front and figures:
        metrics = [{"type": name, "value": value} for name, value in figures.items() if name not in COUNTS]
        measured = {"type": "images", "name": images, "split": "validation"}
        result = {"task": {"type": front["pipeline_tag"]}, "dataset": measured, "metrics": metrics}
        front["model-index"] = [{"name": weights.title, "results": [result]}]
    text = yaml.safe_dump(hide_secrets_in(front), sort_keys=False, width=10**6)
    text = f"---\n{text}---\n\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
    text += f"\n{safe_lines(more).strip()}\n" if more else ""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front_matter(form: str, metadata: Mapping[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Return what the hub reads of a card: licence, base model, library, task, tags and prompts."""
    front, licence, base = {}, licence_of(metadata), base_model(metadata)
    if licence is not None:
        is_known = _LICENCES.fullmatch(licence.lower())
        front = {"license": licence.lower()} if is_known else {"license": "other", "license_name": licence}
    if base is not None:
        relation = "adapter" if "lora" in form or form == "kohya" else "finetune"
        front |= {"base_model": base, "base_model_relation": relation}
    name = dict_of(metadata, "task").get("name")
    if form in _LIBRARIES:
        front["library_name"] = _LIBRARIES[form]
    if metadata["output"] or name == "diffusion":
        front["pipeline_tag"] = OUTPUTS[metadata["output"]].pipeline if metadata["output"] else "text-to-image"
    front["tags"] = ["atelier", *([str(name)] if name else [])]
    return front | ({"widget": [{"text": prompt} for prompt in prompts]} if prompts else {})


def _prompts(metadata: Mapping[str, Any]) -> list[str]:
    """Return the texts that a task of pictures generates in training."""
    prompts = dict_of(dict_of(metadata, "task"), "samples").get("prompts") or ()
    return [str(prompt["text"] if isinstance(prompt, dict) else prompt) for prompt in prompts]


def _list(facts: Mapping[str, Any]) -> list[str]:
    return [*(f"- {name}: {code_span(value)}" for name, value in facts.items() if value is not None), ""]


def _list_names(metadata: Mapping[str, Any]) -> list[str]:
    names = label_names(metadata)
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    kind = metadata["output"]
    return [f"{len(names):,} {kind}: {', '.join(map(code_span, names[:_SHOWN_NAMES]))}{more}.", ""] if names else []


def _describe_licence(metadata: Mapping[str, Any]) -> list[str]:
    licence, origin, lines = licence_of(metadata), dict_of(metadata, "origin"), []
    if "source" in origin:
        source = str(origin["source"])
        source = source if source.startswith("hf:") else Path(source).name  # no folder of a disk
        lines.append(f"Trained from {code_span(source)} (layout {code_span(origin.get('layout'))}).")
    if licence is None:
        lines.append("Training began with random weights: no licence of other weights applies, and these are your own.")
    else:
        lines.append(f"Licence of the source weights: {code_span(licence)}.")
    if licence is not None and "cc-by-nc" in licence.lower():
        lines.append("It forbids commercial use, also of these weights.")
    return lines


def _read_recipe(run: RunReader, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return lines about the training, and the run's configuration without paths; nothing if it is damaged."""
    try:
        config = flatten(run.config)
    except UserError as error:  # the weights are whole
        log.warning("README.md: without recipe and pictures: %s", error)
        return {}, {}
    rates = [row["lr"] for row in run.rows if isinstance(row.get("lr"), float)]
    recipe = {name: config.get(key) for name, key in _RECIPE.items()}
    recipe |= {"peak learning rate": max(rates, default=None), "precision": metadata.get("precision")}
    return recipe, _public(config)


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


def _find_pictures(run: RunReader, prefix: str | None) -> dict[str, Path]:
    """Return a run's pictures by caption. prefix: of the pictures of these weights, or None without them."""
    names = {"curves": "curves"}  # without images of the collection
    names |= {} if prefix is None else {name: f"{prefix}{name}" for name in ("samples", "pr_curves", "confusion")}
    files = {show_name(name): run.path / f"plots/{file}.png" for name, file in names.items()}
    return {caption: path for caption, path in files.items() if path.is_file()}


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


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `report["file"]` into export.json, and keep the reports of other files."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
