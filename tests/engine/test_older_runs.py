"""A run folder of an older release is resumed, evaluated and predicted from by the code of today."""

import shutil
from types import SimpleNamespace

import pytest

from engine.resume import _check_fingerprints
from tests.in_process import configure, run
from tests.support import ROOT, rows
from utils.config import recipe
from utils.config.recipe import Added, check_resumable, recipe_hash, with_added
from utils.errors import UserError

OLD = ROOT / "tests/runs/2026_11"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the old run, resumed by the same command with two more steps."""
    folder = tmp_path_factory.mktemp("old") / "copy"
    shutil.copytree(OLD, folder)
    command = [*(folder / "run/overrides.txt").read_text().split(), "augment=glyphs"]  # the default of then
    run("finetune", [*command, "loop.total_steps=6"], folder)
    return folder


def test_it_is_resumed_where_it_ended(place):
    assert [row["step"] for row in rows(place / "run/metrics.jsonl", "train")] == [1, 2, 3, 4, 5, 6]
    assert (place / "run/checkpoints/step_00000006").is_dir()


@pytest.mark.parametrize("weights", ["best_raw", "ema"])
def test_its_weights_are_evaluated(weights, place):
    assert "top1=" in run("evaluate", ["run_dir=run", f"weights={weights}", "runtime.device=cpu"], place)


def test_a_changed_value_is_still_refused(place):
    command = [*(place / "run/overrides.txt").read_text().split(), "augment=glyphs"]
    with pytest.raises(UserError, match="task.label_smoothing"):
        run("finetune", [*command, "loop.total_steps=8", "task.label_smoothing=0.2"], place)


def test_a_fingerprint_that_a_run_lacks_is_unknown_and_passes():
    run, config = SimpleNamespace(fingerprints={"facts": "new", "data": "same"}), SimpleNamespace(resume_allow=[])
    run.saver = SimpleNamespace(folder=OLD)
    _check_fingerprints({"data": "same"}, run, config)


# --------------------------------------------------------------------------------------------- the table of added keys


def test_a_key_at_its_old_value_changes_neither_folder_nor_resume(monkeypatch):
    values = configure("finetune", ["model=convnextv2_atto"])[0].model_dump(mode="json")
    later = {**values, "loop": {**values["loop"], "made_up": 3}}
    with pytest.raises(UserError, match="loop.made_up"):
        check_resumable(values, later, [], "run")
    assert recipe_hash(values) != recipe_hash(later)
    monkeypatch.setitem(recipe.ADDED_KEYS, "loop.made_up", Added(3))
    assert recipe_hash(values) == recipe_hash(later) and check_resumable(values, later, [], "run") == []
    later["loop"]["made_up"] = 4
    assert recipe_hash(values) != recipe_hash(later)
    with pytest.raises(UserError, match=r"loop.made_up: 3 in the run, 4 now"):
        check_resumable(values, later, [], "run")


def test_a_weight_file_takes_the_old_value_of_a_key_that_it_lacks():
    fields = ("name", "mix_probability", "head")
    assert with_added("task", {"name": "x", "head": "kept"}, fields) == {
        "name": "x", "head": "kept", "mix_probability": 1.0
    }  # fmt: skip
    assert with_added("task", {"mix_probability": 0.3}, fields) == {"mix_probability": 0.3}
