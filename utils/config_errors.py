"""Turn the errors of Hydra, OmegaConf and pydantic into lines of `dotted.key: what is wrong and what to do`."""

import re
import typing
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from pydantic import BaseModel, ValidationError

from utils.errors import UserError, close_names


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


def _without_tags(location: tuple[int | str, ...], values: Any) -> list[str]:
    """Return a location's keys without what pydantic adds: a union's tag, a function's name."""
    keys: list[str] = []
    for index, part in enumerate(location):
        if (
            isinstance(values, dict)
            and part in values
            or isinstance(values, list)
            and isinstance(part, int)
            and part < len(values)
        ):
            keys.append(str(part))
            values = values[part]
        elif index == len(location) - 1 and isinstance(values, dict):
            keys.append(str(part))
    return keys


def _field_names(annotation: Any, tag_values: set[str]) -> set[str]:
    """Return the field names of the models that an annotation admits (those whose tag matches, in a union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set(annotation.model_fields)
    names: set[str] = set()
    options = [option for option in typing.get_args(annotation) if not isinstance(option, str)]
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel) and tag_values:
            tags = {tag for field in option.model_fields.values() for tag in typing.get_args(field.annotation)}
            if not tag_values & {tag for tag in tags if isinstance(tag, str)}:
                continue
        names |= _field_names(option, tag_values)
    return names


def _known_keys(keys: list[str], values: Any, schema: type[BaseModel]) -> list[str]:
    """Return the dotted keys that could stand where an unknown one was found."""
    names = set(schema.model_fields)
    annotation: Any = schema
    prefix = keys[:-1]
    for key in prefix:
        values = values.get(key, {}) if isinstance(values, dict) else {}
        fields = annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
        if key not in fields:
            return []
        annotation = fields[key].annotation
        tags = {value for value in values.values() if isinstance(value, str)} if isinstance(values, dict) else set()
        names = _field_names(annotation, tags)
    return [".".join([*prefix, name]) for name in names]


def _close_key(keys: list[str], values: Any, schema: type[BaseModel]) -> str:
    """Return advice for an unknown key: near ones of its level, or the same name elsewhere in the configuration."""
    dotted = ".".join(keys)
    elsewhere = [
        f"{group}.{keys[-1]}" for group, inner in values.items() if isinstance(inner, dict) and keys[-1] in inner
    ]
    if elsewhere:
        return "did you mean " + " or ".join(elsewhere) + "?"
    known = _known_keys(keys, values, schema)
    return close_names(dotted, known) if known else "remove it"


def _problem(error: dict[str, Any], values: Any, schema: type[BaseModel]) -> str:
    """Return one pydantic error as a line."""
    keys = _without_tags(error["loc"], values)
    dotted = ".".join(keys)
    kind, context, found = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        message = str(context["error"])
        return message if re.match(r"[a-z_0-9.]+: ", message) else f"{dotted}: {message}"
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key; {_close_key(keys, values, schema)}"
    if found == "???":
        return f"{dotted}: must be given; add {dotted}=VALUE"
    if kind == "missing":
        return f"{dotted}: missing; add {dotted}=VALUE or the file of its group"
    if kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        allowed = [word.strip().strip("'") for word in context["expected_tags"].split(",")]
        return f"{dotted}.{tag}: unknown {context['tag']!r}; {close_names(str(context['tag']), allowed)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{dotted}: {message.replace('input should be', 'must be')}, found {found!r}"


def validation_problems(error: ValidationError, values: Any, schema: type[BaseModel]) -> list[str]:
    """Return one line per wrong key; a union without tags (`auto` or a number) reports its key once."""
    lines: dict[str, str] = {}
    for item in error.errors():
        line = _problem(item, values, schema)
        key, _, message = line.partition(": ")
        if key in lines and lines[key].partition(", found ")[1] and ", found " in message:
            first = lines[key].partition(", found ")[0]
            line = f"{first}, or {message.removeprefix('must be ')}"
        lines[key] = line
    return list(lines.values())


def hydra_problem(error: Exception) -> str:
    """Return what Hydra or OmegaConf refused, as a line."""
    if isinstance(error, MissingConfigException):
        options = list(getattr(error, "options", None) or [])
        missing = error.missing_cfg_file or ""
        if options:
            group, _, name = missing.rpartition("/")
            return f"{group}: unknown {name!r}; {close_names(name, options)} (files of conf/{group}/)"
        return f"{missing}: no such file in conf/; see conf/ for what there is"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not readable as KEY=VALUE; quote what is special: 'key=\"a, b\"'"
    text = str(error)
    found = re.search(r"Key '([^']+)' is not in struct\s+full_key: ([\w.]+)", text)
    if found is None:
        found = re.search(r"Could not override '([^']+)'", text)
        if found is None:
            return text
        full = re.search(r"full_key: ([\w.]+)", text)
        return f"{full.group(1) if full else found.group(1)}: unknown key; --cfg job prints the known ones"
    return f"{found.group(2)}: unknown key; --cfg job prints the known ones"
