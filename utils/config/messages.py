"""Turn the errors of Hydra, OmegaConf and pydantic into lines of `dotted.key: what is wrong and what to do`."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from utils.config.options import list_options
from utils.config.schema import is_free_group, known_keys, walk_keys
from utils.errors import UserError, close_names

_MOST = 3  # keys that an advice names
_MISSING = "???"


class ConfigError(UserError):
    """A list of problems, each beginning with its dotted key."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = len(problems)
        title = "1 configuration error" if count == 1 else f"{count} configuration errors"
        super().__init__("\n  ".join([title, *problems]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Rebuild from the problems, so that the error can travel to other ranks."""
        return type(self), (self.problems,)


# ---------------------------------------------------------------------------------------------------- unknown keys


def _unknown(dotted: str, schema: type[BaseModel], values: Any = None) -> str:
    """Return the line for an unknown key: the same name in another group is meant, or a near one on its level."""
    known = known_keys(schema, values)
    parts = dotted.split(".")
    elsewhere = [key for key in known if key.rpartition(".")[2] == parts[-1]]
    if elsewhere:
        near = difflib.get_close_matches(dotted, elsewhere, n=_MOST, cutoff=0.0)
        return f"{dotted}: unknown key; did you mean {' or '.join(near)}?"
    while ".".join(parts[:-1]) not in ("", *known):
        parts.pop()
    level = ".".join(parts[:-1])
    beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == level]
    if beside:
        return f"{dotted}: unknown key; {close_names(parts[-1], beside)}"
    if any(key == level and is_free_group(field) for key, field in walk_keys(schema, values)):
        return f"{dotted}: unknown key; {level} takes new keys with a plus: +{dotted}=VALUE"
    return f"{dotted}: unknown key; {level} is a value without keys"


def _not_given(dotted: str) -> str:
    return f"{dotted}: must be given; add {dotted}=VALUE"


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf; an empty group is one."""
    if isinstance(values, dict | list) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), values


def missing_problems(values: Any) -> list[str]:
    """Return a line for each `???` that was not replaced."""
    return [_not_given(dotted) for dotted, value in _leaves(values) if value == _MISSING]


def encoding_problems(values: Any) -> list[str]:
    """Return a line for each key or text that is not UTF-8: that of a command line may have any bytes."""
    return [
        f"{dotted}: must be UTF-8, found {value!a}; rename the file, or write the text anew"
        for dotted, value in _leaves(values)
        if re.search("[\ud800-\udfff]", dotted + (value if isinstance(value, str) else ""))
    ]


# ------------------------------------------------------------------------------------------------------------ pydantic


def _without_tags(location: tuple[int | str, ...], values: Any) -> list[str]:
    """Return a location's keys without what pydantic adds: a union's tag, a function's name."""
    keys: list[str] = []
    for index, part in enumerate(location):
        in_dict = isinstance(values, dict) and part in values
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_dict or in_list:
            keys.append(str(part))
            values = values[part]
        elif index == len(location) - 1 and isinstance(values, dict):
            keys.append(str(part))
    return keys


def _problem(error: dict[str, Any], values: Any, schema: type[BaseModel]) -> str:
    """Return one pydantic error as a line."""
    dotted = ".".join(_without_tags(error["loc"], values))
    kind, context, found = error["type"], error.get("ctx", {}), error["input"]
    if found == _MISSING:
        return _not_given(dotted)
    match kind:
        case "value_error":
            message = str(context["error"])
            return message if re.match(r"[a-z_0-9.]+: ", message) else f"{dotted}: {message}"
        case "extra_forbidden":
            return _unknown(dotted, schema, values)
        case "missing":
            return f"{dotted}: missing; add {dotted}=VALUE or the file of its group"
        case "union_tag_not_found":
            dotted += "." + context["discriminator"].strip("'")
            return f"{dotted}: missing; add {dotted}=VALUE or the file of its group"
        case "union_tag_invalid":
            allowed = [word.strip().strip("'") for word in context["expected_tags"].split(",")]
            advice = close_names(str(context["tag"]), allowed)
            return f"{dotted}.{context['discriminator'].strip(chr(39))}: unknown {context['tag']!r}; {advice}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{dotted}: must be a group of keys, found {found!r}"
        case "too_short":
            return f"{dotted}: must have at least {context['min_length']} items, found {found!r}"
        case "too_long":
            return f"{dotted}: must have at most {context['max_length']} items, found {found!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{dotted}: {message.replace('input should be', 'must be')}, found {found!r}"


def validation_problems(error: ValidationError, values: Any, schema: type[BaseModel]) -> list[str]:
    """Return one line per wrong key; a union without tags (`auto` or a number) reports its key once.

    Where a group is of another kind (`task=fcmae` in finetune.py) its `name` alone is reported, not each key of it.
    """
    lines: dict[str, str] = {}
    items = error.errors()
    strange = {item["loc"][:-1] for item in items if item["type"] == "literal_error" and item["loc"][-1] == "name"}
    for item in items:
        if item["type"] in ("missing", "extra_forbidden") and item["loc"][:-1] in strange:
            continue
        line = _problem(item, values, schema)
        key, _, message = line.partition(": ")
        if key in lines and lines[key].partition(", found ")[1] and ", found " in message:
            first = lines[key].partition(", found ")[0]
            line = f"{first}, or {message.removeprefix('must be ')}"
        lines[key] = line
    return list(lines.values())


# -------------------------------------------------------------------------------------------------- Hydra and OmegaConf


def hydra_problem(error: Exception, schema: type[BaseModel], conf: Path) -> str:
    """Return what Hydra or OmegaConf refused, as a line; `conf` is the folder of the groups' files."""
    if isinstance(error, MissingConfigException):
        return _missing_file(error, conf)
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{key}: no value is given; write {key}=VALUE"
        return f"{key}: {value!r} cannot be read; put special characters in quotes: {key}='\"a, b\"'"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        return _unknown(error.__cause__.full_key, schema)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return str(error)


def _missing_file(error: MissingConfigException, conf: Path) -> str:
    """Say which file of conf/ was not found, and which there are instead."""
    missing = error.missing_cfg_file or ""
    group, _, name = missing.partition("/")
    known = list_options(group, conf) if name else []
    if not known:
        return f"{missing}: no such file in {conf}"
    advice = f"timm has it: model=timm model.name={name}" if group == "model" and _is_in_timm(name) else ""
    return f"{group}: unknown {name!r}; {advice or close_names(name, known)} (files of {conf / group})"


def _is_in_timm(name: str) -> bool:
    import timm  # takes seconds

    return timm.is_model(name)
