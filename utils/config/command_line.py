"""The words of a command line: what they state, and how they are read before Hydra sees them."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from pydantic import BaseModel

from utils.config.help import CONF, list_options, read_defaults
from utils.config.recipe import flatten
from utils.config.schema import list_keys
from utils.config.sweep_config import FLAGS
from utils.errors import about
from utils.io.files import readable
from utils.record.run_reader import run_of

_EXPERIMENT = "experiment"
_FILES = (".yaml", ".yml")
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # OmegaConf's; backslashes before it are escapes


class By(IntEnum):
    """What states a key, from the least firm.

    The plan of `loop.minutes`, a file that an experiment chooses, a file that a word chooses, the experiment, a word.
    """

    NOTHING = 0
    PLAN = 1
    FILE = 2
    CHOICE = 3
    EXPERIMENT = 4
    WORD = 5


_OF_FILE = {By.PLAN: By.PLAN, By.EXPERIMENT: By.FILE, By.WORD: By.CHOICE}  # what states the keys of a chosen file
_Row = tuple[str, By, bool]  # a key, what states it, and whether it names a file of a group


@dataclass(frozen=True)
class Job:
    """The command line: script, chosen files of groups, overrides; and the words that `loop.minutes` adds."""

    script: str
    choices: dict[str, str]
    overrides: list[str]
    planned: Sequence[str] = ()

    def states(self, key: str, least: By = By.FILE) -> bool:
        """Return whether the command states a key at least as firmly as `least`."""
        return self.stated(key) >= max(least, By.PLAN)

    def stated(self, key: str) -> By:
        """Return what states a key, a key below it, or a mapping above it; a chosen file states all of its group."""
        found = By.NOTHING
        for name, by, is_file in self._stated:
            if f"{name}.".startswith(f"{key}."):
                found = max(found, by)
            elif key.startswith(f"{name}."):
                found = max(found, _OF_FILE[by] if is_file else by)
        return found

    @cached_property
    def _stated(self) -> list[_Row]:
        parser = OverridesParser.create()
        rows = []
        for words, by in ((self.overrides, By.WORD), (self.planned, By.PLAN)):
            for override in parser.parse_overrides([*words]):
                values = {override.key_or_group: override.value()}
                rows += [(key, by, key in self.choices) for key in flatten(values)]
                if name := values.get(_EXPERIMENT):
                    rows += _read_experiment(name)
        return rows


def _read_experiment(name: str) -> Iterator[_Row]:
    """Yield what the file of an experiment states, and what the files state that it builds on."""
    file = Path(name) if name.endswith(_FILES) else CONF / _EXPERIMENT / f"{name}.yaml"
    values = yaml.safe_load(file.read_text("utf-8"))
    for item in values.pop("defaults", ()):
        if isinstance(item, dict):
            yield from ((group.rpartition("/")[2], By.EXPERIMENT, True) for group in item)
        elif item != "_self_":
            yield from _read_experiment(item.removeprefix(f"/{_EXPERIMENT}/"))
    yield from ((key, By.EXPERIMENT, False) for key in flatten(values))


# ------------------------------------------------------------------------------------------------ before Hydra reads


class Script(NamedTuple):
    """What the reading of words depends on: the script's name, schema and folder of YAML files, and the typed keys."""

    name: str
    schema: type[BaseModel]
    config_dir: Path
    typed: set[str]


Spelling = Callable[[str, Script], Iterator[str]]  # yields what Hydra gets in place of a word
# Words that people type first, and the keys that scripts without this word have.
_OTHER_NAMES = {
    "data.root": ["input", "run_dir"],
    "epochs": ["loop.total_epochs"],
    "input": ["data.root"],
    "output": ["run_dir"],
    "run_dir": ["weights", "runs"],
    "steps": ["loop.total_steps"],
    "weights": ["init_from"],
}


def _name_usual(word: str, script: Script) -> Iterator[str]:
    """`PATH`, `epochs=X` | `data.root=PATH`, `loop.total_epochs=X`: the names of these keys."""
    key, equals, _ = word.partition("=")
    known = list_keys(script.schema)
    if not equals and key in list_options("job", script.name):
        yield f"job={key}"
        return
    if not (equals or key in known or re.match(r"-|~\w", key) or script.typed & {"data.root", "input"}):  # a path
        key = "run_dir" if run_of(Path(word)) else "data.root"
        word = f"{key}={word}"
    names = [key, *_OTHER_NAMES.get(key, ())]
    name = next((name for name in names if {name, f"job.{name}"} & known.keys()), key)
    yield word.replace(key, name, 1)


def join_spaces(words: Sequence[str]) -> list[str]:
    """Return words in which `KEY = VALUE`, typed with spaces, is one word."""
    text = re.sub(r"\0?=\0(?![-\0]|[^\0]*=)|\0=", "=", "\0".join(words))
    return text.split("\0") if words else []


def _quote_path(word: str, script: Script) -> Iterator[str]:
    """`run_dir=a,b` | `run_dir='a,b'`: paths and terms of a search are text.

    Hydra's grammar refuses paths with non-Latin letters, commas, brackets, `=` or `&`. Hydra reads lists of paths and,
    in a multirun, several paths; if a file has that name, it is one path.
    """
    key, equals, value = word.partition("=")
    if list_keys(script.schema).get(key.lstrip("+")) and equals:
        is_list = value.startswith("[") and value.endswith("]")
        if "," not in value or not (is_list or FLAGS & script.typed) or os.path.exists(value):
            word = f"{key}={_quote(value)}"
    yield word


def _quote(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if is_quoted or value in ("", "null", "???"):
        return value
    return QuotedString(literal(value), Quote.single).with_quotes()


def literal(value: Any) -> Any:
    """Return a text, or the values of a file, so that OmegaConf takes each text as it is."""
    return json.loads(_INTERPOLATION.sub(r"\1\1\\\\${", json.dumps(value)))


def _name_job(word: str, script: Script) -> Iterator[str]:
    """`output=X` | `job.output=X`, in scripts with jobs: keys of no group are those of the job."""
    fields = script.schema.model_fields
    group = re.match(r"([a-z_]+)(\.[a-z_]+)*(=|$)", word)
    yield f"job.{word}" if "job" in fields and group and group[1] not in fields else word


def _choose_folder(word: str, script: Script) -> Iterator[str]:
    """`data.root=X` | `data=image_folder data.root=X`, without `data` and `experiment`."""
    if word.lstrip("+").startswith("data.root=") and not script.typed & {"data", _EXPERIMENT}:
        usual = read_defaults(script.config_dir / f"{script.name}.yaml").get("data", "")
        if usual in ("glyphs", None):
            yield "data=image_folder"
    yield word


def store_experiment(word: str, script: Script) -> Iterator[str]:
    """`experiment=X.yaml` | a file of the group `experiment`, in any folder.

    Hydra knows the file as `of_file`. Only conf/ and the command line may refer to other keys: the file may come from a
    stranger.
    """
    key, _, file = word.partition("=")
    if key == _EXPERIMENT and file.endswith(_FILES):
        with about(_EXPERIMENT), readable(Path(file), "YAML"):
            node = literal(OmegaConf.to_container(OmegaConf.load(file)))
        ConfigStore.instance().store(name="of_file", node=node, group=_EXPERIMENT, package="_global_")
        word = f"{_EXPERIMENT}=of_file"
    yield word


# In order. The first line of a docstring, typed | read as, is also in docs/configuration.md. The run folder records the
# words after these spellings.
SPELLINGS = (_name_usual, _name_job, _quote_path, _choose_folder)


def respell(words: list[str], script: Script, *spellings: Spelling) -> list[str]:
    """Return words in the given spellings."""
    for spell in spellings:
        words = [*chain.from_iterable(spell(word, script) for word in words)]
    return words


def quote_paths(words: list[str], schema: type[BaseModel]) -> list[str]:
    """Return the words of a sweep with quoted paths."""
    return respell(words, Script("", schema, CONF, {*words}), _quote_path)
