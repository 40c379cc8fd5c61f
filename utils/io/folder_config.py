"""config.json beside a weight file: what timm's and transformers' folders state of class names and licence."""

import json
from pathlib import Path
from typing import Any

from utils.record.logging import get_logger

log = get_logger(__name__)

_MAX_BYTES = 64_000_000  # a file with 21,841 class names has about one million
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_config_beside(path: Path) -> dict[str, Any]:
    """Return the config.json of the folder of a weight file; empty for a file of another name, or without one.

    A config.json that cannot be read counts as none; a warning says so.
    """
    file = path.parent / "config.json"
    if path.name not in _WEIGHT_FILES or not file.is_file():
        return {}
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        stated = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stated, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is ignored (%s); its class names and licence are unknown", file, error)
        return {}
    return stated
