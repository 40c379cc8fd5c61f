"""Keys that came after the first release, and keys that were cut since: what saved values of any release mean today.

The configuration of a run and the metadata of a weight file reach the schemas, which have no defaults, through
`read_saved`. A new key of conf/ needs a row in `newer` of versions.yaml, a key that goes one in `cut`
(tests/conf/test_versions.py).
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from utils.io.files import Json, Values, read_beside

_ROWS = read_beside(__file__, "versions.yaml")
NEWER = _ROWS["newer"]
LATER = {**_ROWS["hashed"], **NEWER}
CUT = _ROWS["cut"]


def read_saved(values: Values) -> Json:
    """Return a copy of saved values with the keys that came later, without the keys that were cut and are off.

    A key that was cut stays if it is on and changed weights: the schema of a weight file, or the comparison of a
    resumption, refuses it.
    """
    saved = without(fill(values, LATER), CUT)
    for key in _ROWS["without_weights"]:
        group, name = _find(saved, key)
        group.pop(name, None)
    return saved


def fill(values: Values, rows: Mapping[str, Any]) -> Json:
    """Return a copy of values; keys that are missing get the values of `rows`."""
    filled = deepcopy(dict(values))
    for key, value in rows.items():
        group, name = _find(filled, key)
        group.setdefault(name, value)
    return filled


def without(values: Values, rows: Mapping[str, Any]) -> Json:
    """Return a copy of values without the keys that have the value of `rows`."""
    kept = deepcopy(dict(values))
    for key, value in rows.items():
        group, name = _find(kept, key)
        if group.get(name, value) == value:
            group.pop(name, None)
    return kept


def _find(values: Any, key: str) -> tuple[Json, str]:
    """Return the group of a key and its name there; without such a group, or in one of another kind, an empty group."""
    *groups, name = key.replace("]", "").split(".")
    for group in groups:
        group, _, kind = group.partition("[")
        values = values.get(group)
        if not isinstance(values, dict) or kind not in ("", values.get("name"), values.get("family")):
            return {}, name
    return values, name
