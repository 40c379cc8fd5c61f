"""The recipe: the part of a configuration that must not change when a run resumes.

It is the whole configuration except `FREE_KEYS`: length, cadence, workers, ranks, micro-batch, machine (precision and
determinism belong to the recipe), tracking, the probe, folders and cache sizes. Its hash names the default run folder.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from utils.config.versions import CUT, NEWER, fill, without
from utils.errors import UserError
from utils.io.files import Json, Values, canonical_json, sha256_text

# Patterns for dotted keys; the first match decides. "!" keeps a key in the recipe.
FREE_KEYS = (
    "!runtime.precision",
    "!runtime.deterministic",
    "runtime.*",
    "tracking.*",
    "sweep.*",
    "run_dir",
    "resume*",
    "dry_run",
    "model.pretrained",  # what the plan chose is kept
    "data.corrections",  # what they change is in the collection's fingerprint
    "data.group",
    "data.exclude_copies",
    "data.cache.*_gib",
    "data.cache.folder",
    "loop.total_*",
    "loop.auto.*",
    "loop.early_stop_*",
    "loop.micro_batch_size",
    "loop.*_every*",
    "loop.checkpoint_mirror",
    "task.probe.*",
    "optim.fused_backward",  # changes no bit
    "lr_finder.only",
)


def flatten(values: Values, prefix: str = "") -> Json:
    """Return {dotted key: value} for nested values; lists stay values."""
    flat = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def is_free(key: str, allowed: Iterable[str] = ()) -> bool:
    """Return whether a key may change when a run resumes."""
    for pattern in (*allowed, *FREE_KEYS):
        if fnmatch.fnmatchcase(key, pattern.removeprefix("!")):
            return not pattern.startswith("!")
    return False


def recipe_hash(config: Values) -> str:
    """Return 8 hexadecimal digits that identify the recipe."""
    kept = {key: value for key, value in flatten(without(fill(config, CUT), NEWER)).items() if not is_free(key)}
    return sha256_text(canonical_json(kept))[:8]


def check_resumable(saved: Values, now: Values, allowed: Sequence[str], folder: str) -> list[str]:
    """Compare a run's values with the resumption's; return the differences in `allowed` keys.

    Raises UserError if other keys of the recipe differ.
    """
    old = flatten(saved)
    new = flatten(now)
    lines = {}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not is_free(key):
            lines[key] = f"{key}: {old.get(key)!r} in the run, {new.get(key)!r} now"
    refused = [key for key in lines if not is_free(key, allowed)]
    if refused:
        differences = "\n  ".join(lines[key] for key in refused)
        raise UserError(
            f"resume: {folder} was made with another recipe:\n  {differences}\nStart another run with run_dir=... (a "
            f"sweep with sweep.name=...), or accept these with 'resume_allow=[{','.join(refused)}]'."
        )
    return list(lines.values())
