"""The files of conf/ as text: which there are, and each key's value and meaning. It imports neither Hydra nor torch.

The meaning of a key is the comment behind its value; where its file has none, that of the first file of the group.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]


class Option(NamedTuple):
    """A value as it is written, and what it means."""

    value: str
    meaning: str = ""


Options = dict[str, Option]  # by dotted key, or by group


def list_options(group: str, conf: Path) -> list[str]:
    """Return the options of a group: its files, those of subfolders as `folder/name`."""
    return sorted(file.relative_to(conf / group).with_suffix("").as_posix() for file in (conf / group).rglob("*.yaml"))


def read_script(conf: Path, script: str, chosen: Mapping[str, str]) -> tuple[Options, Options]:
    """Return the groups of a script, and its keys with those of the groups' files. chosen: other files, by group."""
    bases, groups, own = _read_file(conf / f"{script}.yaml")
    groups = {group: option._replace(value=chosen.get(group, option.value)) for group, option in groups.items()}
    keys: Options = {}
    for base in bases:
        keys |= _read_file(conf / f"{base}.yaml")[2]
    for group, (name, meaning) in groups.items():
        name = re.sub(r"\$\{(\w+)\}", lambda other: groups[other[1]].value, name)
        meaning = meaning or own.pop(group).meaning  # beside `model: null` below the list of defaults
        groups[group] = Option(name, meaning)
        if name != "null":
            keys |= {f"{group}.{key}": option for key, option in read_group(conf / group, name).items()}
    return groups, {key: option for key, option in _over(own, keys).items() if not key.startswith("hydra.")}


def read_group(folder: Path, name: str) -> Options:
    """Return the keys of a group's file, over those of the files that it builds on."""
    options = _read_over_bases(folder, name)
    others: Options = {}
    for file in sorted(folder.glob("*.yaml")):
        others = _over(others, _read_file(file)[2])
    return _over(options, {key: others[key] for key in options})


def _read_over_bases(folder: Path, name: str) -> Options:
    bases, _, options = _read_file(folder / f"{name}.yaml")
    for base in bases:
        options = _over(options, _read_over_bases(folder, base))
    return options


def _over(options: Options, others: Options) -> Options:
    """Return options over others, in the others' order; an option without a meaning has the other's."""
    known = {key: option.meaning for key, option in others.items()}
    return others | {key: Option(value, text or known.get(key, "")) for key, (value, text) in options.items()}


def _read_file(file: Path) -> tuple[list[str], Options, Options]:
    """Return a file's list of defaults, the files and the groups in it, and its keys."""
    text = file.read_text(encoding="utf-8")

    def option(node: yaml.Node) -> Option:
        value, rest = text[node.start_mark.index : node.end_mark.index], text[node.end_mark.index :]
        return Option(value, rest.partition("\n")[0].partition("# ")[2])

    bases: list[str] = []
    groups: Options = {}
    keys: Options = {}
    for key, node in _leaves(yaml.compose(text)):
        if key != "defaults":
            keys[key] = option(node)
            continue
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                bases += [item.value] if item.value != "_self_" else []
            elif not (pair := item.value[0])[0].value.startswith("override "):
                groups[pair[0].value] = option(pair[1])
    return bases, groups, keys


def _leaves(mapping: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield dotted keys with their nodes; a mapping in braces is a value."""
    for key, node in mapping.value:
        if isinstance(node, yaml.MappingNode) and not node.flow_style:
            yield from _leaves(node, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", node
