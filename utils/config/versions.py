"""Keys that came after the first release, and keys that were cut since: what saved values of any release mean today.

The configuration of a run and the metadata of a weight file reach the schemas, which have no defaults, through
`read_saved`. A new key of conf/ needs a row in LATER, a key that goes one in CUT (tests/conf/test_versions.py).
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from utils.io.files import Json, Values

# By key, the value that held before; task[tagging]: of a task of that name, model[timm]: of a model of that family.
LATER = {
    "data.concepts": None,
    "data.trigger": None,
    "data.corrections": True,  # there was no such file
    "data.table": "none",
    "data.columns": None,
    "loop.early_stop_least": 0.0,
    "loop.checkpoint_mirror": None,
    "model[timm].pretrained": "auto",
    "task[tagging].loss.gamma": 2.0,  # there was no focal loss
    "task[tagging].loss.alpha": 0.25,
    "task[diffusion].lora.layers": {},
    "task[diffusion].preference_beta": None,
}
# By key, the value that means off.
CUT = {"loop.audit_every": None, "runtime.parallel": "ddp", "task[diffusion].judge": None}
_WITHOUT_WEIGHTS = {"task[diffusion].judge"}  # keys of CUT that changed no weights: they go, whatever their value


def read_saved(values: Values) -> Json:
    """Return a copy of saved values with the keys that came later, without the keys that were cut and are off.

    A key that was cut stays if it is on and changed weights: the schema of a weight file, or the comparison of a
    resumption, refuses it.
    """
    saved = fill(values, LATER)
    for key, off in CUT.items():
        group, name = _find(saved, key)
        if key in _WITHOUT_WEIGHTS or group.get(name, off) == off:
            group.pop(name, None)
    return saved


def fill(values: Values, rows: Mapping[str, Any]) -> Json:
    """Return a copy of values with those of `rows` that it lacks."""
    filled = deepcopy(dict(values))
    for key, value in rows.items():
        group, name = _find(filled, key)
        group.setdefault(name, value)
    return filled


def _find(values: Any, key: str) -> tuple[Json, str]:
    """Return the group of a key and its name there; without such a group, or in one of another kind, an empty group."""
    *groups, name = key.replace("]", "").split(".")
    for group in groups:
        group, _, kind = group.partition("[")
        values = values.get(group)
        if not isinstance(values, dict) or kind not in ("", values.get("name"), values.get("family")):
            return {}, name
    return values, name
