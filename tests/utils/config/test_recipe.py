"""The recipe: what its hash sees, what a resumption may change. Properties and messages."""

import fnmatch

from tests.in_process import TRAINING, load_command
from tests.support import refuses
from utils.config.recipe import FREE_KEYS, check_resumable, recipe_hash
from utils.config.schema import walk_keys

CONFIG = {
    "seed": 0,
    "run_dir": None,
    "loop": {"total_steps": 10, "batch_size": 8, "micro_batch_size": 4},
    "optim": {"lr": 0.1, "betas": [0.9, 0.99], "extra": {}},
    "runtime": {"precision": "fp32", "workers": 0, "deterministic": False},
    "tracking": {"samples": False},
}


def test_the_hash_is_the_same_on_every_machine():
    """A run is found again by it, so it is part of the format."""
    assert recipe_hash({"seed": 0, "name": "é"}) == "882cc0ca"


def test_allowed_differences_are_returned_and_the_others_still_refused():
    now = {**CONFIG, "seed": 1, "optim": {"lr": 0.2, "extra": {}}}
    assert check_resumable(CONFIG, now, ["optim.*", "seed"], "RUN") == [
        "optim.betas: [0.9, 0.99] in the run, None now",
        "optim.lr: 0.1 in the run, 0.2 now",
        "seed: 0 in the run, 1 now",
    ]
    assert check_resumable(CONFIG, {**CONFIG, "new": None}, [], "RUN") == []  # a run of before the key
    with refuses(r"another recipe:\n  seed: 0 in the run, 1 now\nStart"):
        check_resumable(CONFIG, now, ["optim.*"], "RUN")


def test_the_free_keys_exist():
    keys = {key for script in TRAINING for key, _ in walk_keys(load_command(script).schema)}
    for pattern in FREE_KEYS:
        assert fnmatch.filter(keys, pattern.removeprefix("!")), pattern
