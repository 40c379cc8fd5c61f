"""`loop.minutes`: the steps that fit into a time, planned from the first updates, corrected, and repeated on resume."""

import re
from types import SimpleNamespace

import pytest
import torch

from engine.run import pace
from engine.run.clock import Clock, Mark
from engine.run.pace import Pace
from tests.in_process import TINY, make_images, run, run_until_killed
from tests.support import assert_equal_runs, logged, refuses
from utils.io.files import read_json

LENGTH = "loop.total_steps=2"  # of TINY
MORE = ["loop.evaluate_every_epochs=2", "loop.ema_decay=0.9", "loop.checkpoint_every_steps=3"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command of 10 minutes: 20 s of start, steps of 60 s in the first epoch of two, then of 30 s."""
    marks = [0.0]

    def mark(clock, step):
        marks.append(60.0 * min(step, 2) + 30.0 * max(0, step - 2))
        return Mark(step, marks[-1])

    monkeypatch.setattr(Clock, "mark", mark)
    monkeypatch.setattr(pace, "monotonic", lambda: pace.STARTED + 20 + marks[-1])
    root, given = make_images(tmp_path / "images"), [word for word in TINY if word != LENGTH]
    return [*given, *MORE, f"data.root={root}", f"run_dir={tmp_path / 'run'}", "loop.minutes=10"]


def test_a_run_takes_as_many_steps_as_fit_and_a_resumed_one_repeats_its_corrections(words, tmp_path):
    run_until_killed("finetune", words, tmp_path, step=10)  # its last checkpoint has 9 steps
    file = tmp_path / "run/minutes.json"
    found = read_json(file)
    steps = found["corrected"]
    assert (found["minutes"], found["steps"], found["words"], [*steps][:3]) == (10, 400, [], ["2", "3", "4"])
    assert steps["2"] == 8 and [*steps.values()][-1] in (16, 17)  # with evaluations
    assert re.search("start: imports .* collection .* plan .* task", (tmp_path / "run/log.txt").read_text())
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/minutes.json").write_bytes(file.read_bytes())
    run("finetune", words, tmp_path)
    assert read_json(file) == found
    run("finetune", [*words, f"run_dir={tmp_path / 'whole'}"], tmp_path)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole", [*steps.values()][-1])
    with refuses(r"loop\.minutes: 5, but .*run was planned for 10; set loop\.minutes=10"):
        run("finetune", [*words, "loop.minutes=5", "resume_allow=[loop.minutes]"], tmp_path)


def test_corrections_follow_the_first_updates_and_the_end_of_the_first_epoch(tmp_path, monkeypatch):
    """Of 600 s, a step takes 2 s in an epoch of 50 steps, then 1 s; the first one compiles for 100 s."""
    plan = SimpleNamespace(epoch_length=400, batch_size=8, total_steps=100, epoch_at=float)

    def plan_of(steps):
        return SimpleNamespace(total_steps=steps, epoch_at=float, evaluations_after=lambda step: 0)

    clock = SimpleNamespace(mark=lambda step: Mark(step, 100 + min(step, 50) * 2.0 + max(0, step - 50)))
    job = SimpleNamespace(planned=())
    timed = SimpleNamespace(
        plan=plan, step=0, config=SimpleNamespace(loop=SimpleNamespace(minutes=10)),
        folder=SimpleNamespace(path=tmp_path, job=job), recorder=SimpleNamespace(clock=clock),
        learner=SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu"))),
        evaluator=SimpleNamespace(seconds=1.0, finish=None, streams=SimpleNamespace(evaluation_samples=8)),
        plan_of=plan_of,
        use_length=lambda steps: setattr(plan, "total_steps", steps),
    )  # fmt: skip
    monkeypatch.setattr(pace, "STARTED", 0.0)  # no rounding
    monkeypatch.setattr(pace, "monotonic", lambda: clock.mark(timed.step).seconds - pace._END_SEC)
    corrects = Pace(timed)
    lengths = {}
    while timed.step < plan.total_steps:
        corrects.correct()
        lengths[timed.step] = plan.total_steps
        timed.step += 1
    assert (lengths[1], lengths[2], lengths[50], lengths[53], plan.total_steps) == (100, 250, 250, 450, 450)


def test_minutes_that_are_too_few_end_no_run(words, tmp_path, capsys):
    run("finetune", [*words, "loop.minutes=0.5"], tmp_path)
    assert "loop.minutes: 0.5 are too few: the run takes about " in capsys.readouterr().err
    assert read_json(tmp_path / "run/minutes.json")["corrected"] == {"2": 3}


def test_a_refitted_head_is_the_result_if_few_updates_fit(words, tmp_path):
    for _ in range(2):  # the second run is complete
        run("finetune", [*words, "task.head=refitted", "loop.minutes=0.25"], tmp_path)
    assert read_json(tmp_path / "run/minutes.json")["steps"] == 0
    assert logged(tmp_path / "run", "evaluate", "step") == [0]


def test_how_sure_the_best_figure_is_and_what_is_easy_are_said(words, tmp_path, capsys):
    run("finetune", [*words, "loop.minutes=2"], tmp_path)
    said = capsys.readouterr().err
    found = read_json(tmp_path / "run/result.json")
    (low, high), value = found["interval"], found["value"]
    assert low < value < high and f"top-1 {value:.4g} (95 % interval: {low:.4g} to {high:.4g})" in said
    assert ", always one class 0.5" in said and re.search(r"by class +\w+ \d of 2 right, ", said)
    run("finetune", [*words, "loop.minutes=2"], tmp_path)  # a complete run keeps it
    assert read_json(tmp_path / "run/result.json") == found
