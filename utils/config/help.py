"""`--help` of the root scripts: from a script's docstring and the files of conf/, in a tenth of a second.

A root script imports this module first: the answer is printed before torch, timm or pyarrow is imported, and the
process ends.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config.options import ROOT, list_options, read_script

_CONF = ROOT / "conf"
_MOST = 15  # files of a group that are named
_WIDTH = 36  # of a key with its default
_FLAGS = {
    "--cfg job": "print every key with its value, and stop",
    "--multirun": "run each choice of the values that commas separate, seed=0,1,2 (docs/configuration.md)",
}


def describe(script: Path, documentation: str, words: Sequence[str] = ()) -> str:
    """Return the help of a script; a group's file that `words` choose (optim=sgd) is described in place of its own."""
    chosen = dict(word.partition("=")[::2] for word in words if "/" not in word)  # not recipes, which set many groups
    chosen = {group: name for group, name in chosen.items() if (_CONF / group / f"{name}.yaml").is_file()}
    groups, keys = read_script(_CONF, script.stem, chosen)
    choices = "[GROUP=FILE ...] " if groups else ""
    title, _, examples = documentation.partition("\n")
    lines = [
        title,
        "",
        f"Usage: python {script.relative_to(ROOT)} {choices}[KEY=VALUE ...] [FLAG ...]",
        "",
        *(["Groups: each is a folder of conf/, of which one file is read."] if groups else []),
        *(f"{_line(group, *option)}: {_name_files(group)}" for group, option in groups.items()),
        *([""] if groups else []),
        "Keys with their defaults (null: none; ???: must be given). `--help GROUP=FILE` has those of another file.",
        *(_line(key, *option) for key, option in keys.items()),
        "",
        "Flags:",
        *(f"  {flag:{_WIDTH}}  {meaning}" for flag, meaning in _FLAGS.items()),
        "",
        "Examples:",
    ]
    return "\n".join([*lines, examples])


def _line(key: str, value: str, meaning: str) -> str:
    return f"  {f'{key}={value}':{_WIDTH}}  {meaning}"


def _name_files(group: str) -> str:
    names = list_options(group, _CONF)
    return ", ".join(names) if len(names) <= _MOST else f"{len(names)} files, such as {names[0]}"


_script = Path(sys.argv[0]).resolve()
if {"--help", "-h"} & set(sys.argv) and _script.is_relative_to(ROOT) and (_CONF / f"{_script.stem}.yaml").is_file():
    sys.stdout.write(describe(_script, sys.modules["__main__"].__doc__, sys.argv[1:]))
    sys.exit()
