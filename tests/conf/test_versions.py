"""Keys that came later or were cut: no key lacks a row, and runs of the first release resume by the same command."""

import json
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.conf.test_no_dead_key import list_parts
from tests.in_process import SCRIPTS, TRAINING, configure, load_command
from tests.support import refuses
from utils.config.recipe import check_resumable, recipe_hash
from utils.config.versions import CUT, LATER, read_saved

FIRST_RELEASE = Path(__file__).parent / "first_release"


def list_fields(schema, prefix=""):
    """Yield (key, field) of a schema, such as task[tagging].loss.gamma; a group in a list or a table is one key."""
    for name, field in schema.model_fields.items():
        parts = list_parts(field.annotation, within=(list, dict, tuple))
        groups = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        yield from [] if groups else [(prefix + name, field)]
        for group in groups:
            chosen = [group.model_fields[key].annotation for key in ("family", "name") if key in group.model_fields]
            names = [typing.get_args(each) for each in chosen if len(typing.get_args(each)) == 1]
            yield from list_fields(group, f"{prefix}{name}{f'[{names[0][0]}]' if names else ''}.")


def list_keys():
    return {key for script in TRAINING for key, _ in list_fields(load_command(script).schema)}


def has_row(key, rows):
    """Return whether a row names a key, or a group that it is in."""
    plain, labels = re.sub(r"\[.*?\]", "", key), re.findall(r"\[(.*?)\]", key)
    return any(f"{plain}.".startswith(f"{row.key}.") and row.only in (None, *labels) for row in rows)


def test_no_key_has_a_default_in_the_code():
    schemas = [load_command(script).schema for script in SCRIPTS]
    assert not [key for schema in schemas for key, field in list_fields(schema) if not field.is_required()]


def test_each_key_that_came_later_or_was_cut_has_a_row():
    first, now = set((FIRST_RELEASE / "keys.txt").read_text().split()), list_keys()
    groups = {key.partition("]")[0] for key in now}  # task[distillation, a kind that went
    assert not [key for key in now - first if not has_row(key, LATER)]
    gone = [key for key in first - now if key.partition("]")[0] in groups or "]" not in key]
    assert not [key for key in gone if not has_row(key, CUT)]


@pytest.mark.parametrize("kind", ["classification", "tagging", "fcmae", "diffusion"])
def test_a_run_of_the_first_release_is_found_and_resumes_by_its_command(kind):
    """words: those of the command, and for SDXL what it settles. The schema takes what the run has saved."""
    first = json.loads((FIRST_RELEASE / f"{kind}.json").read_text())
    config, _ = configure(first["script"], first["words"])
    now = config.model_dump(mode="json")
    assert recipe_hash(now) == first["hash"]
    saved = read_saved(first["config"])
    assert type(config).model_validate_json(json.dumps(saved)).model_dump(mode="json") == saved
    assert check_resumable(saved, now, [], "RUN") == []


def test_an_older_run_has_what_held_before_and_a_key_that_was_cut_while_on_is_refused_by_name():
    loss = {"name": "bce", "gamma_neg": 4.0, "clip": 0.05}
    older = {"seed": 0, "loop": {"audit_every": None}, "task": {"name": "tagging", "loss": loss}}
    task = {"name": "tagging", "loss": {**loss, "gamma": 2.0, "alpha": 0.25}}
    loop = {"early_stop_least": 0.0, "checkpoint_mirror": None}
    assert read_saved(older) == {"seed": 0, "loop": loop, "task": task}
    judged = read_saved({"task": {"name": "diffusion", "lora": None, "judge": {"prompts": 8}}})
    with refuses("task.judge.prompts: 8 in the run, None now"):
        check_resumable(judged, {"task": {**judged["task"], "judge": None}}, [], "RUN")
