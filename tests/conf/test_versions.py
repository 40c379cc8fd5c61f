"""Keys that came later or were cut: no key lacks a row, and runs of the first release resume by the same command."""

import json
from pathlib import Path

import pytest

from tests.conf.test_no_dead_key import list_leaves, plain
from tests.in_process import SCRIPTS, TRAINING, configure, load_command
from utils.config.recipe import check_resumable, recipe_hash
from utils.config.versions import CUT, LATER, read_saved
from utils.io.files import read_json

FIRST_RELEASE = Path(__file__).parent / "first_release"


def has_row(key, rows):
    """Return whether a row names a key, or a group that it is in."""
    return any(f"{name}.".startswith(f"{row}.") for row in rows for name in (key, plain(key)))


def test_no_key_has_a_default_in_the_code():
    schemas = [load_command(script).schema for script in SCRIPTS]
    assert not [key for schema in schemas for key, field in list_leaves(schema) if not field.is_required()]


def test_each_key_that_came_later_or_was_cut_has_a_row():
    first = set((FIRST_RELEASE / "keys.txt").read_text().split())
    now = {key for script in TRAINING for key, _ in list_leaves(load_command(script).schema)}
    groups = {key.partition("]")[0] for key in now}  # task[distillation, a kind that went
    assert not [key for key in now - first if not has_row(key, LATER)]
    gone = [key for key in first - now if key.partition("]")[0] in groups or "]" not in key]
    assert not [key for key in gone if not has_row(key, CUT)]


@pytest.mark.parametrize("kind", ["classification", "tagging", "fcmae", "diffusion"])
def test_a_run_of_the_first_release_is_found_and_resumes_by_its_command(kind):
    """words: those of the command, and for SDXL what it settles. The schema takes what the run has saved."""
    first = read_json(FIRST_RELEASE / f"{kind}.json")
    config, _ = configure(first["script"], first["words"])
    now = config.model_dump(mode="json")
    assert recipe_hash(now) == first["hash"]
    saved = read_saved(first["config"])
    assert type(config).model_validate_json(json.dumps(saved)).model_dump(mode="json") == saved
    assert check_resumable(saved, now, [], "RUN") == []


def test_an_older_run_has_what_held_before_and_keeps_a_key_that_was_cut_while_on_unless_it_changed_no_weights():
    loss = {"name": "bce", "gamma_neg": 4.0, "clip": 0.05}
    older = {"seed": 0, "loop": {"audit_every": None}, "task": {"name": "tagging", "loss": loss}}
    task = {"name": "tagging", "loss": {**loss, "gamma": 2.0, "alpha": 0.25}, "tag_weights": None}
    task |= {"known": [], "keep_old": 0.3}
    loop = {"early_stop_least": 0.0, "checkpoint_mirror": None, "ema_start_steps": 0}
    assert read_saved(older) == {"seed": 0, "loop": loop, "task": task}
    assert "judge" not in read_saved({"task": {"name": "diffusion", "lora": None, "judge": {"prompts": 8}}})["task"]
    assert read_saved({"loop": {"audit_every": 100}})["loop"]["audit_every"] == 100
