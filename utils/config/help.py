"""The text of `--help`: a script's docstring and the files of conf/ that it reads, in a tenth of a second."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from utils.io.files import Json

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
_USAGE = """\

Usage: python {script} [GROUP=FILE ...] [KEY=VALUE ...] [FLAG ...]

Flags:
  --cfg job      print every key with its value, and stop
  --multirun     of training: run each choice of the values that commas separate, seed=0,1,2 (docs/configuration.md)

Keys with their defaults (null: none; ???: must be given). A group is a folder of conf/. One of its files is read;
`--help GROUP=FILE` shows another. A key in it is GROUP.KEY, such as optim.lr."""


def list_options(group: str, script: str | None = None) -> list[str]:
    """Return the files of a group (in subfolders as `folder/name`); script: only those that this script accepts.

    A file names its scripts in a comment: `# Scripts: train, finetune`, or a recipe in `# Command: python train.py`.
    """
    files = {
        file.relative_to(CONF / group).with_suffix("").as_posix(): file for file in (CONF / group).rglob("[!_]*.yaml")
    }
    return sorted(name for name, file in files.items() if script is None or _accepts(script, group, file))


def _accepts(script: str, group: str, file: Path) -> bool:
    text = file.read_text("utf-8")
    names = re.findall(r"^# Scripts: (.*)$|^# Command: .*?(\w+)\.py experiment=", text, flags=re.MULTILINE)
    return script in ", ".join(map("".join, names)).split(", ") if names else group != "experiment"


def read_defaults(file: Path) -> dict[str, str | None]:
    """Return the file of each group that a script's own file names."""
    items = yaml.safe_load(file.read_text("utf-8")).get("defaults", ())
    return {group: name for item in items if isinstance(item, dict) for group, name in item.items()}


def read_option(group: str, name: str) -> Json:
    """Return the values in a group's file, without those that it builds on."""
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text("utf-8"))
    values.pop("defaults", None)
    return values


def show_help(script: Path, documentation: str, words: Sequence[str] = ()) -> str:
    """Return the help of a script; `words` may choose other files of groups (optim=sgd)."""
    title, _, examples = documentation.partition("\n")
    lines = [title, examples.rstrip(), _USAGE.format(script=script.relative_to(ROOT)), *_read(CONF, script.stem)]
    chosen = dict(word.partition("=")[::2] for word in words)
    names = {}
    for group, name in read_defaults(CONF / f"{script.stem}.yaml").items():
        names[group] = re.sub(r"\$\{(\w+)\}", lambda other: names[other[1]], name or "null")
    for group, name in names.items():
        known = list_options(group, script.stem)
        name = chosen[group] if chosen.get(group) in known else name
        if (CONF / group).is_dir():
            lines += ["", f"{group}={name}  ({', '.join(known)})"]
        if name in known:
            lines += [f"  {line}" for line in _read(CONF / group, name)]
    return "\n".join([*lines, ""])


def _read(folder: Path, name: str) -> Iterator[str]:
    """Yield the lines of the files that a file builds on, then its own lines."""
    text = (folder / f"{name}.yaml").read_text("utf-8")
    for base in yaml.safe_load(text).get("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            yield from _read(folder, base)
    without_list = re.sub(r"^defaults:\n(?:  - .*\n)+", "", text, flags=re.MULTILINE)
    yield from (line for line in without_list.splitlines() if line != "# @package _global_")
