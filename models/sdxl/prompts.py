"""Read files of prompts: one on each line, with the options of sd-scripts and the web UIs, or a list in YAML or JSON.

    prompts = read_prompts("prompts.txt", size_hw=(1024, 1024))

Source: kohya-ss/sd-scripts:library/train_util.py, line_to_prompt_dict; AUTOMATIC1111/stable-diffusion-webui:
scripts/prompts_from_file.py.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from models.sdxl.sampling import Prompt, PromptText
from utils.config.messages import ConfigError, validate
from utils.config.schema import Strict
from utils.errors import about
from utils.io.files import readable
from utils.record.logging import get_logger

log = get_logger(__name__)

_OPTIONS = {
    "n": "negative", "negative_prompt": "negative", "w": "width", "width": "width", "h": "height", "height": "height",
    "d": "seed", "seed": "seed", "l": "guidance", "cfg_scale": "guidance", "s": "steps", "steps": "steps",
    "prompt": "text",
}  # fmt: skip
_OPTION = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")
_NUMBERS = {"width": int, "height": int, "seed": int, "steps": int, "guidance": float}
_MULTIPLE_PX = 8  # sizes are rounded down to it, as in sd-scripts
_LEAST_PX = 64


class _Prompts(Strict):
    prompts: Annotated[list[PromptText], Field(min_length=1)]


def read_prompts(file: str, size_hw: Sequence[int], key: str = "prompts") -> list[str | Prompt]:
    """Return the prompts of a .txt file, one on each line, or of a .yaml or .json list of texts and mappings.

    A line of a .txt file that begins with # is a comment. size_hw: of a prompt that states its width or height alone.
    key: of the configuration, which messages name. Raises UserError for a wrong entry, by its number from 0.
    """
    path = Path(file)
    with about(key), readable(path, ".txt, .yaml or .json"):
        text = path.read_text("utf-8-sig")
        if path.suffix in (".yaml", ".yml", ".json"):
            prompts = yaml.safe_load(text)
        else:
            unread: Counter[str] = Counter()
            lines = [line.strip() for line in text.split("\n")]
            prompts = [_read_line(line, size_hw, unread) for line in lines if line and not line.startswith("#")]
            if unread:
                named = ", ".join(f"--{name} ({count:,} lines)" for name, count in unread.items())
                read = " ".join(f"--{name}" for name in _OPTIONS)
                log.warning("%s: %s has options that are not read: %s; those that are: %s", key, path, named, read)
    try:
        return validate({"prompts": prompts}, _Prompts).prompts
    except ConfigError as error:
        raise ConfigError(*(line.replace("prompts", key, 1) for line in error.args)) from None


def _read_line(line: str, size_hw: Sequence[int], unread: Counter[str]) -> str | dict[str, Any]:
    """Return a prompt of a line, with its options; add to `unread` those without a counterpart."""
    text, *pieces = _OPTION.split(line)
    values: dict[str, Any] = {"text": text.strip()}
    for name, piece in zip(pieces[::2], pieces[1::2]):
        field = _OPTIONS.get(name)
        if field is None:
            unread[name] += 1
        else:
            values[field] = _read_value(field, piece.strip())
    if values.get("seed") == -1:  # a random one
        del values["seed"]
    if {"width", "height"} & values.keys():
        sides = values.pop("height", size_hw[0]), values.pop("width", size_hw[1])
        values["image_size_hw"] = [_round_side(side) for side in sides]
    return values if len(values) > 1 else values["text"]


def _read_value(field: str, text: str) -> str | int | float:
    """Return the value of an option; a number that cannot be read stays a text, which is refused."""
    read = _NUMBERS.get(field)
    if read is None:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    try:
        return read(text)
    except ValueError:
        return text


def _round_side(side: str | int) -> str | int:
    return max(side - side % _MULTIPLE_PX, _LEAST_PX) if isinstance(side, int) else side
