"""Turn the settings of another program into an experiment of finetune_sdxl.py (prepare.py job=import).

A program's table has its defaults, and formulas for the names of sd-scripts; then recipe.yaml has those for our keys.
Formulas are Jinja's expressions, of the tables alone: no text of a source is read as one. A formula whose condition
does not hold sets nothing.
"""

import math
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, TemplateError, Undefined
from jinja2.sandbox import SandboxedEnvironment

from data.config import DataConfig
from data.tools.config import Import
from sdxl.imports.read import Source, read_number, read_source
from utils.errors import UserError
from utils.formats.spelling import split_tags
from utils.io.files import Json, Values, output_errors, read_beside, write_text
from utils.record.logging import log

_NAME = re.compile(r"[A-Za-z_][\w.]*")  # in a formula
_TOP = ("seed", "init_from")  # our keys without a dot


def convert_config(job: Import, data: DataConfig) -> str:
    """Convert the file. Raises UserError (`job.source`, `job.output`)."""
    values, program, notes = read_experiment(job.source)
    head = ["@package _global_", f"From {job.source} of {program}. Other than there:", *notes]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with output_errors("job.output", Path(job.output)):
        write_text(Path(job.output), text)
    for note in notes:
        log.warning("job.source: other than in %s: %s", program, note)
    return f"wrote {job.output}; next: python finetune_sdxl.py experiment={job.output}"


def read_experiment(file: str) -> tuple[Json, str, list[str]]:
    """Return the values of an experiment, the program, and what differs. Raises UserError."""
    source = read_source(Path(file))
    table = _read_table(source.program)
    recipe = _read_table("recipe")
    parts = ("concepts", "run") if source.run else ("concepts",)
    formulas = [table["formulas"], *(recipe[part] for part in parts)]
    notes = _find_unread(source, table, recipe)
    concepts = []
    for own in source.concepts or [{}]:
        values = {**recipe["defaults"], **table["defaults"], **source.run, **own}
        ours = {}
        for name, formula in (row for rows in formulas for row in rows.items()):
            if isinstance(value := _evaluate(name, formula, values), Undefined):
                continue
            (ours if "." in name or name in _TOP else values)[name] = value
        if refused := values.get("refused"):
            raise UserError(f"job.source: {file} trains {refused}; SDXL alone is trained here")
        notes += [text for condition, text in recipe["notes"].items() if _evaluate("notes", condition, values)]
        if ours["concept.repeats"] == 0:
            log.info("job.source: %s has 0 repeats and is left out, as there", ours["concept.path"])
        else:
            concepts.append(ours)
    if not concepts:
        raise UserError(f"job.source: {file} has no folder that is trained; write one with repeats")
    values = _join(concepts, notes)
    return values, table["program"], sorted(set(notes))


def _read_table(name: str) -> Json:
    """Return a table, with the rows of the one that it extends."""
    table = read_beside(__file__, f"{name}.yaml")
    if "extends" in table:
        below = _read_table(table["extends"])
        table |= {part: below[part] | table.get(part, {}) for part in ("defaults", "formulas", "without")}
    return table


def _find_unread(source: Source, table: Json, recipe: Json) -> list[str]:
    """Return a line for each setting that no formula reads, and why, unless it is off or the program's default."""
    read = {*_NAME.findall(str([table["formulas"], recipe]))}
    lines = []
    for name, value in chain(*(values.items() for values in (source.run, *source.concepts))):
        why = table["without"].get(name, "has no counterpart")
        if why and value and name not in read and value != table["defaults"].get(name):
            lines.append(f"{name.replace('__', '.')}={value!r}: {why}")
    return lines


def _evaluate(name: str, formula: object, values: Values) -> Any:
    """Return the value of a formula, `Undefined` if its condition does not hold. Raises UserError."""
    try:
        return _LANGUAGE.compile_expression(str(formula), undefined_to_none=False)(**values)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        found = {each: values[each] for each in _NAME.findall(str(formula)) if each in values}
        raise UserError(f"job.source: {name}: cannot be made from {found}: {error}; correct a value") from None


def _size_hw(value: object) -> list[int]:
    """Return height and width of a number, or of width and height, also as text."""
    width, height = (re.findall(r"\d+", str(value)) * 2)[:2]
    return [int(height), int(width)]


def _read_pairs(value: list[str] | str) -> Json:
    """Return the values of texts `name=value`."""
    words = value.split() if isinstance(value, str) else value
    pairs = (word.partition("=") for word in words)
    return {name: read_number(text) for name, _, text in pairs}


def _spell(text: str) -> str:
    return ", ".join(split_tags(text))


_LANGUAGE = SandboxedEnvironment(undefined=ChainableUndefined)
_LANGUAGE.filters |= {"pairs": _read_pairs, "size_hw": _size_hw, "tags": _spell}
_LANGUAGE.filters |= {"exists": os.path.exists, "fromkeys": dict.fromkeys, "product": math.prod}
_LANGUAGE.filters |= {"float": float, "int": int}  # Jinja's own give 0 for other texts


def _join(concepts: list[Json], notes: list[str]) -> Json:
    """Return the values of an experiment; add to `notes` what differs in it."""
    run = {}
    places = {}
    for own in concepts:
        mine = {name.removeprefix("concept."): own.pop(name) for name in list(own) if name.startswith("concept.")}
        for name, value in own.items():
            if name in ("task.buckets.areas_px", "task.buckets.sizes_hw"):
                known = run.setdefault(name, [])
                known += [one for one in value if one not in known]
            elif run.setdefault(name, value) != value:
                notes.append(f"{name}: {run[name]!r} for all, although folders differ")
        place = mine.pop("path", None)
        places.setdefault(place and os.path.abspath(os.path.expanduser(place)), mine)
    if len(places) < len(concepts):
        run["task.buckets.assign"] = "all"
        notes.append("data.concepts: a folder that is there several times is trained as the first time, in each size")
    for name, value in mine.items():
        if name.startswith("captions.") and all(other[name] == value for other in places.values()):
            run[f"task.{name}"] = value
    if None in places:
        notes.append("data.root: the images are not in the file; set it")
        return _nest(run)
    run["data.root"] = root = os.path.commonpath(places)
    run["data.concepts"] = []
    for place, own in places.items():
        own = {name: value for name, value in own.items() if f"task.{name}" not in run}
        run["data.concepts"].append(_nest({"path": os.path.relpath(place, root), **own}))
    return _nest(run)


def _nest(flat: Json) -> Json:
    """Return nested values for dotted names. A name `override.GROUP` chooses a file."""
    nested = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    if chosen := nested.pop("override", {}):
        nested = {"defaults": [{f"override /{group}": name} for group, name in chosen.items()], **nested}
    return nested
