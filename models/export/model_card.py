"""README.md, licence and export.json of an export: what the files are, and whose terms apply to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.export import snippets
from models.outputs import OUTPUTS
from utils.errors import UserError
from utils.io.files import read_json, write_json

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name
_UNKNOWN = "unknown"


def licence_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the licence of the weights that a model began with; `unknown` where nothing states one.

    None where it began with drawn weights: no licence of others applies.
    """
    origin = metadata.get("origin") or {}
    return (origin["licence"] or _UNKNOWN) if "licence" in origin else None


def licence_entry(key: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence under a key of an exported file; empty where there is none."""
    licence = licence_of(metadata)
    return {} if licence is None else {key: licence}


def label_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a head's outputs, classes or tags; none for a backbone, or where they are mere numbers."""
    if metadata.get("numbered_classes"):
        return []
    return list(metadata.get(OUTPUTS[metadata["output"]].names_key, ()))


def write_card(folder: Path, form: str, file: str, metadata: Mapping[str, Any]) -> None:
    """Write README.md, with the licence where the hub looks for it. file: the exported one, of format `form`."""
    licence, origin = licence_of(metadata), metadata.get("origin") or {}
    steps = [f"- {name}: {value}" for name, value in metadata["preprocessing"].items()]
    lines = [] if licence is None else ["---", f"license: {licence}", "---", ""]
    lines += [f"# {metadata['model']['name']}, format {form}", ""]
    lines += ["In training, images were prepared so:", "", *steps, ""]
    if metadata.get("channel_order") == "BGR":
        lines += ["It takes BGR: turn the channels round after timm's transform, on an image that is padded to a "
                  "white square, as neggles/wdv3-timm does.", ""]  # fmt: skip
    if form in snippets.FORMATS:
        lines += ["```python", snippets.snippet(form, metadata, file).rstrip(), "```", ""]
    elif form == "safetensors" and metadata.get("task"):
        lines += [f"    python predict.py weights={file} input=image.png output=predictions.jsonl", ""]
    if "source" in origin:
        lines.append(f"Trained from {origin['source']} (layout {origin.get('layout')}).")
    if licence is None:
        lines.append("Training began with drawn weights: no licence of other weights applies, and these are your own.")
    else:
        lines.append(f"Licence of the source weights: {licence}.")
    if licence is not None and "cc-by-nc" in licence.lower():
        lines.append("It forbids commercial use, of these weights too.")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `report["file"]` into export.json; those of other files stay."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
