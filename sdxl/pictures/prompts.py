"""Read files of prompts: one on each line, with the options of sd-scripts and the web UIs, or a list; write prompts.

    prompts = read_prompt_file("prompts.txt", size_hw=(1024, 1024))

Source: kohya-ss/sd-scripts:library/train_util.py, line_to_prompt_dict, load_prompts;
AUTOMATIC1111/stable-diffusion-webui:scripts/prompts_from_file.py.
"""

import re
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from sdxl.config import Prompt, PromptText
from utils.config.bounds import Some
from utils.config.messages import ConfigError, validate
from utils.config.schema import Strict
from utils.errors import about
from utils.formats.emphasis import MARK, escape, read_emphasis
from utils.io.files import Json, read_beside, readable
from utils.record.logging import log

_FIELDS = read_beside(__file__, "options.yaml")
_OPTION = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")
_WORDS = re.compile(r"\b(?:BREAK|AND)\b")  # the web UIs read them as commands; CLIP ignores capitals
_MULTIPLE_PX = 8  # sizes are rounded down to it, as in sd-scripts


class _Prompts(Strict):
    prompts: Some[PromptText]


def read_prompt_file(file: str, size_hw: Sequence[int], key: str = "prompts") -> list[str | Prompt]:
    """Return the prompts of a .txt file, one on each line, of a .yaml or .json list of texts and mappings, or a .toml.

    A line of a .txt file that begins with # is a comment. size_hw: the other side of a prompt with one side.
    key: the key of the configuration that messages name. Raises UserError for a wrong entry, by its number from 0.
    """
    path = Path(file)
    with about(key), readable(path, ".txt, .yaml, .json or .toml"):
        text = path.read_text("utf-8-sig")
        if "<lora:" in text:
            log.warning(
                "%s: %s has <lora:NAME:0.8>, which is text here; lora=[FILE:0.8] of predict.py adds one", key, path
            )
        if path.suffix in (".yaml", ".yml", ".json"):
            prompts = yaml.safe_load(text)
        elif path.suffix == ".toml":
            shared = tomllib.loads(text)["prompt"]
            prompts = [{**shared, **own} for own in shared.pop("subset")]
        else:
            lines = [line.strip() for line in text.split("\n")]
            lines = [line for line in lines if line and not line.startswith("#")]
            prompts = [_read_line(line) for line in lines]
            if unread := {name for line in lines for name in _OPTION.findall(line)} - _FIELDS.keys():
                names = ", ".join(sorted(unread))
                log.warning("%s: %s has options that are not read: %s; read: %s", key, path, names, ", ".join(_FIELDS))
    if isinstance(prompts, list):
        prompts = [_rename(each, size_hw) if isinstance(each, dict) else each for each in prompts]
    try:
        return validate({"prompts": prompts}, _Prompts).prompts
    except ConfigError as error:
        raise ConfigError(*(line.replace("prompts", key, 1) for line in error.args)) from None


def _read_line(line: str) -> str | Json:
    """Return the prompt of a line, with its options. A number that cannot be read stays a text, which is refused."""
    text, *pieces = _OPTION.split(line)
    values = {"text": text.strip()}
    for name, piece in zip(pieces[::2], pieces[1::2]):
        field = _FIELDS.get(name)
        if field in ("text", "negative"):
            values[field] = re.sub(r'^"(.*)"$', r"\1", piece.strip())
        elif field:
            values[field] = yaml.safe_load(piece.strip() or "''")
    return values if len(values) > 1 else values["text"]


def _rename(values: Json, size_hw: Sequence[int]) -> Json:
    """Return the values of a prompt under the names of `Prompt`."""
    values = {_FIELDS.get(name, name): value for name, value in values.items()}
    if values.get("seed") == -1:  # a random one
        del values["seed"]
    if {"width", "height"} & values.keys():
        sides = values.pop("height", size_hw[0]), values.pop("width", size_hw[1])
        sides = [side - side % _MULTIPLE_PX if isinstance(side, int) else side for side in sides]
        values["image_size_hw"] = sides
    return values


def count_brackets(texts: Collection[str], emphasis: bool, what: str) -> None:
    """Log how many texts have brackets of emphasis, and how they are read. what: the name of the texts."""
    count = sum(read_emphasis(text).plain != text for text in texts if MARK.search(text))
    if count:
        how = "emphasis" if emphasis else "text"
        log.info("%s: %d of %d have brackets, which are read as %s", what, count, len(texts), how)


def spell_prompt(text: str, emphasis: bool) -> str:
    """Return a prompt in the spelling of the web UIs: they read it as `read_emphasis` reads `text`.

    Source: AUTOMATIC1111/stable-diffusion-webui:modules/prompt_parser.py.
    """
    if not emphasis:
        return _quote(text)
    chunks = read_emphasis(text).chunks
    return " BREAK ".join("".join(_weigh(_quote(part), weight) for part, weight in chunk) for chunk in chunks)


def _weigh(text: str, weight: float) -> str:
    return text if weight == 1 else f"({text}:{weight:.4g})"


def _quote(text: str) -> str:
    """Return a text without emphasis and commands."""
    return _WORDS.sub(lambda found: found[0].lower(), escape(text))
