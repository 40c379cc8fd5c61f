"""README.md and licence of an export: what the files are, and whose terms apply to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.outputs import OUTPUTS

_UNKNOWN = "unknown"


def licence_of(metadata: Mapping[str, Any]) -> str:
    """Return the licence of the weights that a model began with; `unknown` where nothing states one."""
    origin = metadata.get("origin") or {}
    return origin.get("licence") or _UNKNOWN


def label_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of a head's outputs, classes or tags; none for a backbone, or where they are mere numbers."""
    if metadata.get("numbered_classes"):
        return []
    return list(metadata.get(OUTPUTS[metadata["output"]].names_key, ()))


def write_card(folder: Path, title: str, usage: str, metadata: Mapping[str, Any]) -> None:
    """Write README.md, with the licence where the hub looks for it."""
    licence, origin = licence_of(metadata), metadata.get("origin") or {}
    lines = ["---", f"license: {licence}", "---", "", f"# {title}", "", f"    {usage}", ""]
    if origin:
        lines.append(f"Trained from {origin.get('source')} (layout {origin.get('layout')}), licence: {licence}.")
    if "cc-by-nc" in licence.lower():
        lines.append("The licence of the source weights forbids commercial use, of these weights too.")
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
