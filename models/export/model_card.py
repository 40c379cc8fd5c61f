"""README.md, licence and export.json of an export."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.export import snippets
from models.outputs import OUTPUTS
from utils.errors import UserError
from utils.io.files import read_json, write_json
from utils.io.safe_text import code_span, hide_secrets
from utils.record.figures import show_cell, show_rows

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the licence of a model's source weights, `unknown` if it is not stated.

    Return None if training began with random weights, because then no other licence applies.
    """
    origin = _origin_of(metadata)
    return str(origin["licence"] or "unknown") if "licence" in origin else None


def _origin_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the origin in the metadata, which a stranger may have written."""
    origin = metadata.get("origin")
    return origin if isinstance(origin, dict) else {}


def licence_entry(key: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence under a key of an exported file, or nothing without a licence."""
    licence = licence_of(metadata)
    return {} if licence is None else {key: licence}


def label_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a head's classes or tags; empty for a backbone."""
    return list(metadata.get(OUTPUTS[metadata["output"]].names_key, ()))


def write_card(
    folder: Path,
    form: str,
    file: str,
    metadata: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Any]] = {},
    table: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write README.md, with front matter for the hub. file: the exported file, in format `form`.

    figures: of an evaluation, by the name of its images. table: the thresholds.
    """
    licence, origin = licence_of(metadata), _origin_of(metadata)
    steps = [f"- {code_span(name)}: {code_span(value)}" for name, value in metadata["preprocessing"].items()]
    front = [] if licence is None else [f"license: {json.dumps(hide_secrets(licence))}"]  # a text of YAML
    front += ["library_name: timm", "pipeline_tag: image-classification"] if form == "wd_repository" else []
    lines = ["---", *front, "---", ""] if front else []
    lines += [f"# {code_span(metadata['model']['name'])}, format {form}", ""]
    lines += ["Preprocessing of the images in training:", "", *steps, ""]
    if snippets.takes_bgr(form, metadata):
        lines += ["It takes BGR: pad the image to a white square, apply timm's transform, then reverse the channels, "
                  "like neggles/wdv3-timm.", ""]  # fmt: skip
    for images, numbers in figures.items():
        shown = [f"- {name}: {show_cell(value)}" for name, value in numbers.items()]
        lines += [f"Measured on {images}:", "", *shown, ""]
    if table:
        fitted = "Thresholds, fitted to one half of the images of their calibration and measured on the other:"
        lines += [fitted, "", "```", show_rows(table), "```", ""]
    if form in snippets.FORMATS:
        lines += ["```python", snippets.snippet(form, metadata, file).rstrip(), "```", ""]
    elif form == "safetensors" and metadata.get("task"):
        lines += [f"    python predict.py weights={file} input=image.png output=predictions.jsonl", ""]
    if "source" in origin:
        lines.append(f"Trained from {code_span(origin['source'])} (layout {code_span(origin.get('layout'))}).")
    if licence is None:
        lines.append("Training began with random weights: no licence of other weights applies, and these are your own.")
    else:
        lines.append(f"Licence of the source weights: {code_span(licence)}.")
    if licence is not None and "cc-by-nc" in licence.lower():
        lines.append("It forbids commercial use, also of these weights.")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `report["file"]` into export.json, and keep the reports of other files."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
