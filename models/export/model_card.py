"""README.md, licence and export.json of an export.

A card has only what is known: an unknown fact has no line. Texts may be a stranger's: they are shown as code.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.export import snippets
from models.outputs import OUTPUTS
from utils.errors import UserError
from utils.io.files import read_json, write_json
from utils.io.safe_text import code_span, hide_secrets_in, safe_lines
from utils.record.figures import COUNTS, show_cell, show_interval, show_rows

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name
PICTURES = "pictures"  # the folder of a card's pictures
_LIBRARIES = {  # of formats, as the hub names them
    "timm": "timm", "wd_repository": "timm", "transformers": "transformers",
    **dict.fromkeys(("kohya", "lora_diffusers", "single_file", "diffusers"), "diffusers"),
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


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the weight file's metadata; everything may be missing.

    title: a name for people. figures: of an evaluation, by the name of its images. thresholds: rows of a table.
    recipe: lines about the training. config: of the run, without paths. pictures: files, by their captions. more: a
    user's Markdown, which is appended.
    """

    title: str | None = None
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    thresholds: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    more: str = ""


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the licence of a model's source weights, `unknown` if it is not stated.

    Return None if training began with random weights, because then no other licence applies.
    """
    origin = dict_of(metadata, "origin")
    return str(origin["license"] or "unknown") if "license" in origin else None


def dict_of(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a dictionary in the metadata, which a stranger may have written."""
    value = metadata.get(key)
    return value if isinstance(value, dict) else {}


def licence_entry(key: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence under a key of an exported file, or nothing without a licence."""
    licence = licence_of(metadata)
    return {} if licence is None else {key: licence}


def refuse_licence(metadata: Mapping[str, Any]) -> None:
    """Raise UserError (`license`) if the licence of the source weights is unknown, or forbids to share changed ones."""
    licence = licence_of(metadata) or ""
    if licence == "unknown":
        reason = "is unknown, and the hub shows one"
    elif re.search(r"\bnd\b", licence.lower()):
        reason = f"is {licence}, which forbids to share changed weights"
    else:
        return
    raise UserError(f"license: the licence of the source weights {reason}; set license=NAME if you know another one")


def label_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a head's classes or tags; empty for a backbone."""
    return list(metadata.get(OUTPUTS[metadata["output"]].names_key, ())) if metadata["output"] else []


def base_model(metadata: Mapping[str, Any]) -> str | None:
    """Return the hub's name of the weights that training began with; None if they are not from there."""
    match = re.match(r"(?:hf:([\w.-]+/[\w.-]+)[/@]|timm ([\w.-]+)$)", str(dict_of(metadata, "origin").get("source")))
    return None if match is None else match[1] or f"timm/{match[2]}"


def front_matter(form: str, metadata: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    """Return what the hub reads of a card: licence, base model, library, task, tags, prompts and figures."""
    output, licence = metadata["output"], licence_of(metadata)
    library = _LIBRARIES.get(form)
    pipeline = OUTPUTS[output].pipeline if output else "text-to-image" if library == "diffusers" else None
    front: dict[str, Any] = {}
    if licence is not None:
        is_known = _LICENCES.fullmatch(licence.lower())
        front = {"license": licence.lower()} if is_known else {"license": "other", "license_name": licence}
    if (base := base_model(metadata)) is not None:
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if "lora" in form or form == "kohya" else "finetune"
    front |= {name: text for name, text in (("library_name", library), ("pipeline_tag", pipeline)) if text}
    front["tags"] = ["atelier", *([str(name)] if (name := dict_of(metadata, "task").get("name")) else [])]
    if prompts := _prompts(metadata):
        front["widget"] = [{"text": prompt} for prompt in prompts]
    results = [
        {"task": {"type": pipeline}, "dataset": {"type": "images", "name": images, "split": "validation"},
         "metrics": [{"type": name, "value": value} for name, value in numbers.items() if name not in COUNTS]}
        for images, numbers in facts.figures.items() if pipeline
    ]  # fmt: skip
    if results:
        front["model-index"] = [{"name": facts.title or metadata["model"]["name"], "results": results}]
    return hide_secrets_in(front)


def _prompts(metadata: Mapping[str, Any]) -> list[str]:
    """Return the texts that a task of pictures generates in training."""
    prompts = dict_of(dict_of(metadata, "task"), "samples").get("prompts") or ()
    return [str(prompt["text"] if isinstance(prompt, dict) else prompt) for prompt in prompts]


def write_card(folder: Path, form: str, file: str, metadata: Mapping[str, Any], facts: CardFacts = CardFacts()) -> None:
    """Write README.md, with front matter for the hub, and its pictures. file: the exported file, in format `form`."""
    output = metadata["output"]
    lines = [f"# {code_span(facts.title or metadata['model']['name'])}, format {form}", ""]
    lines += _list_names(metadata)
    if steps := metadata.get("preprocessing"):
        shown = [f"- {code_span(name)}: {code_span(value)}" for name, value in steps.items()]
        lines += ["Preprocessing of the images in training:", "", *shown, ""]
    if snippets.takes_bgr(form, metadata):
        lines += ["It takes BGR: pad the image to a white square, apply timm's transform, then reverse the channels, "
                  "like neggles/wdv3-timm.", ""]  # fmt: skip
    if program := snippets.program(form, metadata, file, base_model(metadata)):
        lines += ["## Use", "", program, ""]
    lines += _describe_training(metadata, facts)
    for images, numbers in facts.figures.items():
        samples = numbers.get("samples")
        shown = [
            f"- {name}: {show_cell(value)}{show_interval(name, value, samples)}" for name, value in numbers.items()
        ]
        lines += ["## Results", "", f"Measured on {images}:", "", *shown, ""]
    if facts.thresholds:
        fitted = "Thresholds, fitted to one half of the images of their calibration and measured on the other:"
        lines += [fitted, "", "```", show_rows(facts.thresholds), "```", ""]
    for caption, path in facts.pictures.items():
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / path.name).write_bytes(path.read_bytes())
        lines += [f"![{caption}]({PICTURES}/{path.name})", ""]
    lines += [f"- {code_span(prompt)}" for prompt in _prompts(metadata)] + [""]
    lines += ["## Limits", "", f"- {_LIMITS[output]}", "- The figures and examples hold for images like those it was "
              "trained on; measure it on yours.", "", "## Licence", "", *_describe_licence(metadata)]  # fmt: skip
    front = yaml.safe_dump(front_matter(form, metadata, facts), sort_keys=False, width=10**6)
    text = f"---\n{front}---\n\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
    text += f"\n{safe_lines(facts.more).strip()}\n" if facts.more else ""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _list_names(metadata: Mapping[str, Any]) -> list[str]:
    names = label_names(metadata)
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    kind = metadata["output"]
    return [f"{len(names):,} {kind}: {', '.join(map(code_span, names[:_SHOWN_NAMES]))}{more}.", ""] if names else []


def _describe_training(metadata: Mapping[str, Any], facts: CardFacts) -> list[str]:
    """Return the lines about images, recipe and configuration."""
    trained_on = dict_of(metadata, "trained_on").items()
    trained_on = {name.replace("_", " "): value for name, value in trained_on if isinstance(value, int | str)}
    known = {**trained_on, **facts.recipe, "step of these weights": metadata.get("step")}
    shown = [f"- {name}: {code_span(value)}" for name, value in known.items() if value is not None]
    lines = ["## Training", "", *shown, ""]
    if facts.config:
        values = [f"{key}={json.dumps(value)}" for key, value in facts.config.items()]
        lines += ["<details><summary>Configuration</summary>", "", "```", *values, "```", "", "</details>", ""]
    return lines


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


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `report["file"]` into export.json, and keep the reports of other files."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
