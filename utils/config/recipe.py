"""What makes two runs the same recipe, and what may differ between a run and its resumption.

The recipe is the whole configuration but an allow-list: length, cadence, workers, ranks, micro-batch, machine (except
precision and determinism), tracking, the probe, folders, the size of caches. Its hash names the default run folder, so
another recipe gets another folder; on resume everything outside the list must be equal.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.io.files import canonical_json, sha256_text

# Patterns over dotted keys. The first that matches decides: "!" keeps a key in the recipe.
FREE_KEYS = (
    "!runtime.precision",
    "!runtime.deterministic",
    "runtime.*",
    "tracking.*",
    "sweep.*",
    "run_dir",
    "resume",
    "resume_allow",
    "dry_run",
    "data.cache.disk_gib",
    "data.cache.folder",
    "loop.total_epochs",
    "loop.total_steps",
    "loop.early_stop_epochs",
    "loop.batch_size",
    "loop.log_every_steps",
    "loop.evaluate_every_epochs",
    "loop.evaluate_raw",
    "loop.plot_every_steps",
    "loop.checkpoint_every_steps",
    "loop.checkpoint_every_minutes",
    "loop.keep_checkpoints",
    "loop.save_in_background",
    "loop.on_failed_save",
    "loop.max_skipped_steps",
    "task.probe.*",
    "data.cache.memory_gib",
)


class Added(NamedTuple):
    """A key that came after the first runs. before: what held without it. hashed: folders are named with it already."""

    before: Any
    hashed: bool = False


# Keys that releases have added. A run or a weight file without the key has the value of `before`; a key of that value
# leaves the name of the default run folder as it was. A new key with an effect on results belongs here.
ADDED_KEYS = {
    "task.mix_probability": Added(1.0, hashed=True),
    "task.mix_switch_probability": Added(0.5, hashed=True),
    "task.class_weights": Added("none", hashed=True),
    "lr_finder.enabled": Added(False, hashed=True),
    "augment.eval_resize": Added("crop", hashed=True),
    "data.background": Added(None),
    "data.icc": Added(False),
    "data.cache.format": Added("raw"),
    "data.cache.quality": Added(90),
    "augment.pad": Added("none"),
    "schedule.restarts": Added(0),
    "optim.bf16_weights": Added(False),
    "model.image_size_hw": Added(None),
    "augment.shrink": Added(False),
    "task.ignore_padding": Added(False),
    "task.tag_weights.reestimate_steps": Added(None),
}

# Keys that releases have removed, with the default that they had, under which folders are named still; None: a key that
# was no part of the recipe. They change nothing on a resumption: the rate that a range test found is in the checkpoint.
REMOVED_KEYS = {
    "lr_finder.start_lr": 1e-5,
    "lr_finder.end_lr": 10.0,
    "lr_finder.curve": "exponential",
    "lr_finder.smoothing": 0.9,
    "lr_finder.diverge_factor": 4.0,
    "lr_finder.suggestion": "auto",
    "loop.on_too_many_skipped": None,
}


def with_added(group: str, values: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return the values of a group of the configuration, with the added keys among `fields` that they lack."""
    added = {name: ADDED_KEYS[key].before for name in fields if (key := f"{group}.{name}") in ADDED_KEYS}
    return {**added, **values}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def is_free(key: str, allowed: Iterable[str] = ()) -> bool:
    """Return whether a dotted key may differ between a run and its resumption."""
    for pattern in (*allowed, *FREE_KEYS):
        if fnmatch.fnmatchcase(key, pattern.removeprefix("!")):
            return not pattern.startswith("!")
    return False


def recipe_hash(config: Mapping[str, Any]) -> str:
    """Return 8 hexadecimal digits of the recipe's hash."""
    kept = {key: value for key, value in flatten(config).items() if not is_free(key) and not _is_as_before(key, value)}
    removed = {key: value for key, value in REMOVED_KEYS.items() if value is not None}
    return sha256_text(canonical_json({**removed, **kept}))[:8]


def _is_as_before(key: str, value: Any) -> bool:
    added = ADDED_KEYS.get(key)
    return added is not None and not added.hashed and value == added.before


def check_resumable(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], folder: str) -> list[str]:
    """Compare the configuration of a run with that of its resumption; returns the accepted differences.

    Raises UserError where another key differs, and where resume_allow names a key that does not exist.
    """
    old, new = flatten(saved), flatten(now)
    for pattern in allowed:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in old | new):
            raise UserError(f"resume_allow: {pattern!r} is not a key of this configuration; --cfg job prints the keys")
    refused, passed = [], []
    for key in sorted((old.keys() | new.keys()) - REMOVED_KEYS.keys()):
        absent = ADDED_KEYS[key].before if key in ADDED_KEYS else "(absent)"
        before, after = old.get(key, absent), new.get(key, absent)
        if before == after:
            continue
        line = f"{key}: {before!r} in the run, {after!r} now"
        if not is_free(key, allowed):
            refused.append(line)
        elif not is_free(key):
            passed.append(line)
    if refused:
        keys = ",".join(line.partition(":")[0] for line in refused)
        raise UserError(
            f"resume: {folder} was made with another recipe:\n  " + "\n  ".join(refused) + "\nStart another run with "
            f"run_dir=... (a sweep with sweep.name=...), or accept these with 'resume_allow=[{keys}]'."
        )
    return passed
