"""What a run goes on from: which checkpoint, what it may find changed, what of its state is refused or passed over.

Runs in the test's own process; equality of killed runs as real processes: test_exactness.py, test_survival.py.
"""

import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from engine.run.checkpoint import Saver
from engine.tasks.classification import ClassificationTask
from tests.engine.test_checkpoint import flip_a_bit, steps_in
from tests.in_process import TINY, make_images, run, run_until_killed
from tests.support import (
    assert_same_rows,
    assert_same_tensors,
    checkpoint_tensors,
    logged,
    refuses,
)
from utils.io.files import read_json
from utils.io.weights import read_weights
from utils.record.run_reader import RunReader

# Two steps an epoch; the last step evaluates in any case.
QUIET = [*TINY, "data.root=images", "run_dir=run", "loop.evaluate_every_epochs=100"]


@pytest.fixture
def place(tmp_path):
    make_images(tmp_path / "images")
    return tmp_path


def finetune(place, *overrides, kill_at_step=None):
    """Fine-tune, and die before update `kill_at_step` (counted from 0); returns the log since the last start."""
    file = place / "run/log.txt"
    before = len(file.read_text()) if file.exists() else 0
    if kill_at_step is None:
        run("finetune", [*QUIET, *overrides], place)
    else:
        run_until_killed("finetune", [*QUIET, *overrides], place, kill_at_step)
    return file.read_text()[before:]


def left(place):
    return steps_in(place / "run/checkpoints")


# --- which checkpoint


def test_a_save_between_a_whole_checkpoint_and_a_damaged_one_stays(place):
    """The folder holds 2 and a damaged 4; the run goes on at 2 and saves 3."""
    finetune(place, "loop.total_steps=4", "loop.checkpoint_every_steps=2")
    flip_a_bit(place / "run/checkpoints/step_00000004/weights.safetensors")
    said = finetune(place, "loop.total_steps=3", "loop.checkpoint_every_steps=9")
    assert "step_00000004 is damaged" in said and "at step 2" in said
    assert "WARNING resume: the next save removes the checkpoints beyond step 2" in said
    assert left(place) == [2, 3]
    assert "at step 3" in finetune(place, "loop.total_steps=5", "loop.checkpoint_every_steps=9")
    assert left(place) == [3, 5]
    assert not list((place / "run/checkpoints").glob(".*"))


def test_the_same_command_with_a_checkpoint_named_continues_from_what_it_has_made(place, monkeypatch):
    """The folder holds 2 to 8, the command names 4, and is killed twice: before its first save and after it."""
    length = ["loop.total_steps=9", "loop.checkpoint_every_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr("engine.run.checkpoint.KEPT", 9)
        finetune(place, *length, kill_at_step=8)
    assert left(place) == [2, 4, 6, 8]
    named = [*length, "resume=run/checkpoints/step_00000004"]

    assert "resumed from run/checkpoints/step_00000004" in finetune(place, *named, kill_at_step=5)
    assert left(place) == [2, 4, 6, 8]  # until the next save
    assert "resumed from run/checkpoints/step_00000004" in finetune(place, *named, kill_at_step=7)
    assert left(place) == [4, 6] and not list((place / "run/checkpoints").glob(".step_*"))
    said = finetune(place, *named)
    assert "step_00000006 was written by this command; the run continues from it, not from run/checkpoints/" in said
    assert "at step 6" in said
    assert left(place) == [8, 9]
    assert logged(place / "run", "train", "step") == list(range(1, 10))

    finetune(place, *length, "run_dir=straight")
    assert_same_tensors(checkpoint_tensors(place / "straight", 9), checkpoint_tensors(place / "run", 9))


def test_a_run_that_is_stopped_in_an_evaluation_begins_with_it(place, monkeypatch):
    """At the end of an epoch and of the run; a kill in between leaves its rows once."""
    evaluate, stops = ClassificationTask.evaluate, [2, 4, 4]

    def stopped(self, loaders, step):
        if step in stops[:1]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, loaders, step)

    length = ["loop.total_steps=4", "loop.evaluate_every_epochs=1", "loop.checkpoint_every_steps=9"]
    run("finetune", [*QUIET, *length, "run_dir=straight"], place)
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "evaluate", stopped)
        for step in (2, 4, 4):
            with pytest.raises(SystemExit, match="75"):
                finetune(place, *length)
            assert left(place)[-1] == step
            assert RunReader(place / "run").state == "stopped" and RunReader(place / "run").progress["step"] == step
            assert set(logged(place / "run", "evaluate", "step")) == {2} - {step}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # after the evaluation
        patch.setattr(Saver, "save", lambda *_, **__: 1 / 0)
        finetune(place, *length)
    assert RunReader(place / "run").state == "failed"
    finetune(place, *length)
    told = {"state": "finished", "step": 4, "total_steps": 4, "left_sec": None, "best": 0.75, "metric": "top1"}
    assert RunReader(place / "run").state == "finished" and RunReader(place / "run").progress == told
    assert_same_rows(place / "straight", place / "run")
    assert_same_tensors(checkpoint_tensors(place / "straight", 4), checkpoint_tensors(place / "run", 4))


# --- what has changed


def test_a_changed_collection_that_is_allowed_is_logged(place):
    finetune(place, "loop.total_steps=1")
    (place / "images/train/A/000.png").unlink()
    said = finetune(place, "loop.total_steps=2", "resume_allow=[data.root]")
    states = [read_json(place / f"run/checkpoints/step_0000000{step}/state.json") for step in (1, 2)]
    before, after = (state["fingerprints"]["data.root"] for state in states)
    assert before != after and "WARNING resume_allow accepts data.root: " in said


# --- the best figure


def find(monkeypatch, values):
    """Let the evaluations at some steps find other values."""
    evaluate = ClassificationTask.evaluate

    def changed(self, loaders, step):
        report = evaluate(self, loaders, step)
        report.scalars[self.best_metric] = values.get(step, report.scalars[self.best_metric])
        return report

    monkeypatch.setattr(ClassificationTask, "evaluate", changed)


@pytest.mark.parametrize(
    "values, is_lowest, killed_at",
    [([0.2, 0.6, math.nan, 0.6], False, 2), ([math.nan, 0.2, 0.4, 0.2], True, None)],
)
def test_the_best_weights_are_those_of_the_best_figure(values, is_lowest, killed_at, place, monkeypatch):
    """Of two equal figures those of the later; one that is not finite is never the best."""
    find(monkeypatch, dict(enumerate(values, start=1)))
    monkeypatch.setattr(ClassificationTask, "best_is_lowest", is_lowest)
    monkeypatch.setattr("engine.run.checkpoint.KEPT", 9)
    settings = ["loop.total_steps=4", "loop.evaluate_every_epochs=0.5", "optim.lr=0.01"]
    if killed_at is not None:
        finetune(place, *settings, kill_at_step=killed_at)
    finetune(place, *settings)
    best = read_json(place / "run/checkpoints/step_00000004/state.json")["best"]
    assert (best["value"], best["step"]) == (values[1], 4) and best["interval"][0] < values[1] < best["interval"][1]
    best, metadata = read_weights(place / "run/weights/best_weights.safetensors")
    assert metadata["step"] == 4
    for step in (1, 2, 3, 4):
        saved = load_file(place / f"run/checkpoints/step_{step:08d}/weights.safetensors")
        assert all(torch.equal(best[name], saved[name]) for name in saved) == (step == 4)


# --- a requeued job


def test_a_requeued_job_goes_on_where_the_command_says_never(place, monkeypatch):
    settings = ["loop.total_steps=3", "resume=never"]
    finetune(place, *settings, kill_at_step=2)
    with refuses(r"^resume: never was given, but run holds [12] checkpoints"):
        finetune(place, *settings)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "resumed from run/checkpoints/step_0000000" in finetune(place, *settings)
    assert left(place)[-1] == 3 and logged(place / "run", "train", "step") == [1, 2, 3]


def test_the_rate_of_prodigy_is_logged(place):
    words = ["optim=prodigy", "+optim.extra.d_coef=1e4", "schedule=constant"]
    finetune(place, *words, "loop.total_steps=4", "loop.batch_size=8")
    d = logged(place / "run", "train", "d")
    assert d[-1] > d[0] == 1e-6
