"""Keys that came after the first release, and keys that were cut since: what saved values of any release mean today.

The configuration of a run and the metadata of a weight file reach the schemas, which have no defaults, through
`read_saved`. A new key of conf/ needs a row in LATER, a key that goes one in CUT (tests/conf/test_versions.py).
"""

from copy import deepcopy
from typing import Any, NamedTuple

from utils.io.files import Json, Values


class Key(NamedTuple):
    """A dotted key. value: what held before the key came, or means off. only: of a task's name or a model's family."""

    key: str
    value: Any
    only: str | None = None


LATER = (
    Key("data.concepts", None),
    Key("data.trigger", None),
    Key("data.corrections", True),  # there was no such file
    Key("data.table", "none"),
    Key("data.columns", None),
    Key("loop.early_stop_least", 0.0),
    Key("loop.checkpoint_mirror", None),
    Key("model.pretrained", "auto", "timm"),
    Key("task.loss.gamma", 2.0, "tagging"),  # there was no focal loss
    Key("task.loss.alpha", 0.25, "tagging"),
    Key("task.lora.layers", {}, "diffusion"),
    Key("task.preference_beta", None, "diffusion"),
)
CUT = (
    Key("loop.audit_every", None),
    Key("runtime.parallel", "ddp"),
    Key("task.judge", None, "diffusion"),
)


def read_saved(values: Values) -> Json:
    """Return a copy of saved values with the keys that came later, without the keys that were cut and are off.

    A key that was cut and is on stays: the schema of a weight file, or the comparison of a resumption, refuses it.
    """
    saved = deepcopy(dict(values))
    for row in LATER:
        _group(saved, row).setdefault(row.key.rpartition(".")[2], deepcopy(row.value))
    for row in CUT:
        group = _group(saved, row)
        name = row.key.rpartition(".")[2]
        if name in group and group[name] == row.value:
            del group[name]
    return saved


def with_cut(values: Values) -> Json:
    """Return a copy of today's values with the keys that were cut, off: the names of run folders count them."""
    earlier = deepcopy(dict(values))
    for row in CUT:
        _group(earlier, row).setdefault(row.key.rpartition(".")[2], row.value)
    return earlier


def _group(values: Json, row: Key) -> Json:
    """Return the group that a key belongs to, or an empty one: none is there, or one of another kind."""
    group: Any = values
    for name in row.key.split(".")[:-1]:
        group = group.get(name) if isinstance(group, dict) else None
    top = values.get(row.key.partition(".")[0])
    kinds = (top.get("name"), top.get("family")) if isinstance(top, dict) else ()
    is_its = row.only is None or row.only in kinds
    return group if isinstance(group, dict) and is_its else {}
