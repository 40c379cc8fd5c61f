"""Validate a configuration, and turn errors of Hydra, OmegaConf and pydantic into lines `dotted.key: problem; fix`."""

import re
from typing import Any, TypeVar

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError

from utils.config.help import CONF, list_options
from utils.config.recipe import flatten
from utils.config.schema import Strict, list_keys
from utils.errors import UserError, close_names

Schema = TypeVar("Schema", bound=Strict)
_CHOICES = re.compile(r"(data|job|optim|schedule|task|tracking)\.name")  # no keys to type: the group is, optim=sgd


class ConfigError(UserError):
    """A list of problems, each with its dotted key first."""

    def __str__(self) -> str:
        """Return a title, and a line for each problem."""
        count = len(self.args)
        return "\n  ".join([f"{count} configuration error{'s' * (count > 1)}", *self.args])


def validate(values: Any, schema: type[Schema]) -> Schema:
    """Check composed values against the schema. Raises ConfigError with one line per wrong key."""
    container = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    # A text field would accept `???`.
    leaves = flatten(container) if isinstance(container, dict) else {}
    problems = {key: f"must be given; add {key}=VALUE" for key, value in leaves.items() if value == "???"}
    try:
        config = schema.model_validate(container)
    except ValidationError as error:
        problems = wrong_keys(error, container, schema) | problems
    if problems:
        raise ConfigError(*map(": ".join, problems.items()))
    return config


def wrong_keys(error: ValidationError, values: Any, schema: type[Strict]) -> dict[str, str]:
    """Return {key: problem}. A union without tags (`auto` or a number) reports its key once.

    If a group has the wrong kind (`task=fcmae` in finetune.py), only its `name` is reported, not each of its keys.
    """
    items = error.errors()
    wrong_groups = {item["loc"][:-1] for item in items if item["type"] == "literal_error" and item["loc"][-1] == "name"}
    problems = {}
    for item in items:
        if item["type"] in ("missing", "extra_forbidden") and item["loc"][:-1] in wrong_groups:
            continue
        key, text = _problem(item, _dotted(item["loc"], values), schema)
        found = f", found {item['input']!r}"
        if problems.get(key, "").endswith(found):
            text = f"{problems[key].removesuffix(found)}, or {text.removeprefix('must be ')}"
        problems[key] = text
    return problems


def _dotted(location: tuple[int | str, ...], values: Any) -> str:
    """Return a location's dotted key without pydantic's additions, such as a union's tag or a function's name."""
    keys = []
    for index, part in enumerate(location):
        if part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values)):
            values = values[part]
        elif not isinstance(values, dict) or index < len(location) - 1:
            continue
        keys.append(str(part))
    return ".".join(keys)


def _problem(error: Any, key: str, schema: type[Strict]) -> tuple[str, str]:
    """Return the key and the message for a pydantic error."""
    context = error.get("ctx", {})
    found = f"found {error['input']!r}"
    match error["type"]:
        case "value_error":
            text = str(context["error"])
            named = re.fullmatch(r"([a-z_0-9.]+): (.*)", text, re.DOTALL)
            return named.groups() if named else (key, text)
        case "extra_forbidden":
            return key, _unknown(key, schema)
        case "missing" | "union_tag_not_found":
            key += context["discriminator"].replace("'", ".", 1)[:-1] if context else ""
            return key, f"missing; add {key}=VALUE or the file of its group"
        case "union_tag_invalid":
            names = re.findall("'([^']+)'", context["expected_tags"])
            return (
                f"{key}.{context['discriminator'][1:-1]}",
                f"unknown {context['tag']!r}; {close_names(context['tag'], names)}",
            )
        case "model_type" | "model_attributes_type" | "dict_type":
            return key, f"must be a group of keys, {found}"
    text = re.sub("than or equal to 0[.]0{9,}1$", "than 0", error["msg"])  # `Positive`
    return key, f"{re.sub('^[A-Z][a-z]* should ', 'must ', text)}, {found}"


def _unknown(key: str, schema: type[Strict]) -> str:
    known = {name for name in list_keys(schema) if not _CHOICES.fullmatch(name)}
    return f"unknown key; {close_names(key, known - {key})}"


def hydra_problem(error: Exception, schema: type[Strict]) -> str:
    """Return the message for an error of Hydra or OmegaConf."""
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").partition("/")
        advice = f"; any network of timm: model=timm model.name={name}" if group == "model" else ""
        return f"{group}: unknown {name!r}; {close_names(name, list_options(group))} (files of {CONF / group}){advice}"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals or key.startswith("-"):
            return f"{key}: write KEY=VALUE, without dashes; {close_names(key.lstrip('-'), list_keys(schema))}"
        return f"{key}: {value!r} cannot be read; quote the option for the shell: '{key}=[a,b]', '{key}=\"a, b\"'"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        cause = error.__cause__
        return f"{cause.full_key}: {_unknown(cause.full_key, schema)}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    found = re.match("Sweep parameters '([^=]+)=(.*)' requires|Ambiguous value for argument '([^=]+)=(.*)'", str(error))
    if found is not None:
        key, value = filter(None, found.groups())
        return f"{key}: {value} are several values; add --multirun to run each, or write a list: {key}=[A,B]"
    return str(error)
