"""Keys that came after the first release, and keys that were cut since: what saved values of any release mean today.

The configuration of a run and the metadata of a weight file reach the schemas, which have no defaults, through
`read_saved`. A new key of conf/ needs a row in NEWER, a key that goes one in CUT (tests/conf/test_versions.py).
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from utils.io.files import Json, Values

# By key, the value that held before. At this value a key is not in a recipe's hash, so that older runs are found.
NEWER = {
    "data.splits": True,
    "loop.ema_start_steps": 0,
    "lr_finder.only": False,
    "task[diffusion].buckets.fit": None,
    "task[autoencoder].buckets.fit": None,
    "tracking[wandb].weights": False,
    "sweep.wandb": None,
    "task[tagging].tag_weights": None,
    "task[diffusion].samples.sampler": "auto",
    "task[diffusion].preserve": None,
    "task[diffusion].loss.kind": "l2",
    "task[diffusion].loss.huber_schedule": "snr",
    "task[diffusion].loss.huber_c": 0.1,
    "task[diffusion].noise.perturbation": 0.0,
    "task[diffusion].timesteps.range": [0, 1000],
    "task[diffusion].lora.network_dropout": 0.0,
    "task[diffusion].lora.rank_dropout": 0.0,
    "task[diffusion].lora.module_dropout": 0.0,
    "task[diffusion].lora.scale_weight_norms": None,
    # Both matter after a tagger alone: an unfinished run of an earlier release has other facts.
    "task[tagging].known": [],
    "task[tagging].keep_old": 0.3,
    "model[timm].arguments": {},
}
# The same, with the keys that are in the hash at any value. task[tagging]: of a task of that name, model[timm]: of a
# model of that family.
LATER = {
    "data.concepts": None,
    "data.trigger": None,
    "data.corrections": True,  # there was no such file
    "data.table": "none",
    "data.columns": None,
    "data.group": "none",
    "data.exclude_copies": False,
    "loop.early_stop_least": 0.0,
    "loop.checkpoint_mirror": None,
    "model[timm].pretrained": "auto",
    "task[tagging].loss.gamma": 2.0,  # there was no focal loss
    "task[tagging].loss.alpha": 0.25,
    "task[diffusion].lora.layers": {},
    "task[regression].name": "regression",  # a new task
    **NEWER,
}
# By key, the value that means off.
CUT = {
    "loop.audit_every": None,
    "runtime.parallel": "ddp",
    "sweep.trials": None,
    "task[diffusion].judge": None,
    "task[diffusion].loss.perceptual": None,
    "task[diffusion].captions.order": None,
    "task[diffusion].captions.dropout": None,
    "task[diffusion].preference_beta": None,
    "task[classification].allow_missing_classes": False,
}
# Keys of CUT that changed no weights: they go, whatever their value.
_WITHOUT_WEIGHTS = {"sweep.trials", "task[diffusion].judge", "task[classification].allow_missing_classes"}


def read_saved(values: Values) -> Json:
    """Return a copy of saved values with the keys that came later, without the keys that were cut and are off.

    A key that was cut stays if it is on and changed weights: the schema of a weight file, or the comparison of a
    resumption, refuses it.
    """
    saved = without(fill(values, LATER), CUT)
    for key in _WITHOUT_WEIGHTS:
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
