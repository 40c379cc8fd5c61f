"""Read the settings of another program under its own names: files, and command lines in scripts or pasted text.

No text is interpolated: a variable of a script has the value that the script itself gives it.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import yaml

from data.collection.concepts import find_repeats
from utils.config.recipe import flatten
from utils.errors import UserError, about
from utils.io.files import Json, readable

_PARSERS = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
_MARKS = {"onetrainer": "training_method", "kohya_gui": "LoRA_type"}  # keys that only files of this program have
_SCRIPTS = ("train_text_to_image", "train_dreambooth")  # of diffusers
_FOLDERS = {"train_data_dir": False, "instance_data_dir": False, "reg_data_dir": True, "class_data_dir": True}
_VARIABLE = re.compile(r'^\s*(?:export |set )?"?(\w+)=["\']?(.*?)["\']?\s*$', re.MULTILINE)
_REFERENCE = re.compile(r"\$\{?(\w+)\}?|%(\w+)%")
_CONTINUED = re.compile(r"[\\^`][ \t]*\n")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_OPTION = re.compile(r"--([\w-]+)(?:=(.*))?$", re.DOTALL)


class Source(NamedTuple):
    """What a program trains. program: a table of this folder. run, concepts: values by names, with __ for dots."""

    program: str
    run: Json
    concepts: list[Json]


def read_source(file: Path) -> Source:
    """Return the settings of a file. Raises UserError."""
    with about("job.source"), readable(file, "settings"):
        text = file.read_text("utf-8-sig")
        parse = _PARSERS.get(file.suffix)
        source = _read_command(text, file.parent) if parse is None else _recognise(parse(text), file.parent)
        run, *concepts = (_name_all(values) for values in (source.run, *source.concepts))
    if not run and not concepts:
        raise UserError(f"job.source: {file} has no setting of a program that is read (docs/sdxl.md); name another one")
    return Source(source.program, run, concepts)


def _name_all(values: Json) -> Json:
    """Return values by names for formulas, numbers for their texts, and no empty texts."""
    stated = {name.replace(".", "__"): value for name, value in flatten(values).items() if value != ""}
    return {name: read_number(value) if isinstance(value, str) else value for name, value in stated.items()}


def read_number(text: str) -> float | str:
    """Return the number that a text has, or the text."""
    return (int if text.isdigit() else float)(text) if _NUMBER.fullmatch(text) else text


def _recognise(values: Json | list[Json], folder: Path) -> Source:
    """Return the settings in the values of a file."""
    if isinstance(values, list):
        return Source("onetrainer", {}, values)
    if "process" in values.get("config", ()):
        run = {**values["config"]["process"][0]}
        concepts = run.pop("datasets", [])
        return Source("ai_toolkit", run, concepts)
    program = next((name for name, mark in _MARKS.items() if mark in values), "sd_scripts")
    if program == "onetrainer":
        file = values.pop("concept_file_name", None)
        concepts = values.pop("concepts", None) or (read_source(folder / file).concepts if file else [])
        return Source(program, values, concepts)
    if {"general", "datasets"} & values.keys():
        return Source(program, {}, _list_subsets(values))
    return _complete(program, {name.rpartition(".")[2]: part for name, part in flatten(values).items()}, folder)


def _list_subsets(values: Json) -> list[Json]:
    """Return the subsets of a dataset_config. A subset goes before its dataset, and that before general."""
    subsets = []
    for dataset in values["datasets"]:
        own = {**values.get("general", {}), **dataset}
        subsets += [{**own, **subset} for subset in own.pop("subsets")]
    return subsets


def _complete(program: str, run: Json, folder: Path) -> Source:
    """Return the settings of sd-scripts or diffusers with those of the files and folders that they name."""
    if file := run.pop("config_file", None):
        run = {**read_source(folder / file).run, **run}
    if file := run.pop("dataset_config", None):
        return Source(program, run, read_source(folder / file).concepts)
    concepts = []
    for key, is_reg in _FOLDERS.items():
        if not (root := run.pop(key, None)):
            continue
        if not Path(root).is_dir():
            raise UserError(f"job.source: {key}: {root} is no folder here; write where the images are")
        found = [(one.path, one.repeats, one.trigger) for one in find_repeats(root)]
        for path, repeats, trigger in found or [("", None, None)]:
            stated = {"num_repeats": repeats, "class_tokens": trigger} if trigger else {}
            concepts.append({"image_dir": str(Path(root, path)), "is_reg": is_reg, **stated})
    return Source(program, run, concepts)


def _read_command(text: str, folder: Path) -> Source:
    """Return the options of a command. Quotes are read, and backslashes of Windows' paths stay."""
    variables = dict(_VARIABLE.findall(text))
    text = _REFERENCE.sub(lambda found: variables.get(found[1] or found[2], found[0]), _CONTINUED.sub(" ", text))
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.escape = lexer.commenters = ""
    script = ""
    options = {}
    words = []  # of the option that is read
    for word in lexer:
        if option := _OPTION.match(word):
            words = options[option[1].replace("-", "_")] = [option[2]] if option[2] else []
        elif word.endswith(".py"):
            script = Path(word).stem
            words = []
        else:
            words.append(word)
    run = {name: words[0] if len(words) == 1 else words or True for name, words in options.items()}
    program = "diffusers" if script.startswith(_SCRIPTS) else "sd_scripts"
    return _complete(program, run and {**run, "script": script}, folder)
