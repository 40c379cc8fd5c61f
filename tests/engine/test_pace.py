"""`loop.minutes`: the steps that fit into a time, kept by the run, and equal to a run of so many steps."""

import re
from types import SimpleNamespace

import pytest

from engine.run import pace, timing
from engine.run.clock import Clock, Mark
from engine.run.pace import Length, Pace, Speed
from tests.in_process import TINY, make_images, run, run_until_killed
from tests.support import assert_equal_runs, refuses
from utils.io.files import read_json

LENGTH = "loop.total_steps=2"  # of TINY
MORE = ["loop.evaluate_every_epochs=2", "loop.ema_decay=0.9", "loop.checkpoint_every_steps=3"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command of 10 minutes: 20 s of start, steps of 60 s in the first epoch, then of 39 s, evaluations of 15 s."""
    monkeypatch.setattr(timing, "monotonic", lambda: timing.STARTED + 20)
    monkeypatch.setattr(timing, "_MOST_TIMED_UPDATES", 1)
    monkeypatch.setattr(timing, "_END_SEC", 2.5)
    monkeypatch.setattr(timing, "_time_steps", timed := count_calls(timing._time_steps, Speed(60.0, 39.0, 2)))
    monkeypatch.setattr(timing, "_time_evaluation", count_calls(timing._time_evaluation, 15.0))
    monkeypatch.setattr(pace, "_FIRST_SHARE", 2.0)  # nothing is corrected
    root, given = make_images(tmp_path / "images"), [word for word in TINY if word != LENGTH]
    return [*given, *MORE, f"data.root={root}", f"run_dir={tmp_path / 'run'}", "loop.minutes=10"], timed


def count_calls(function, seconds):
    """Return the function with its real work, timed by a clock that stands still, and then other seconds."""

    def call(run, *arguments):
        function(run, *arguments)
        call.count += 1
        return seconds

    call.count = 0
    return call


def test_a_run_of_minutes_is_one_of_its_steps_also_when_it_is_resumed(words, tmp_path):
    words, timed = words
    run_until_killed("finetune", words, tmp_path, step=7)
    run("finetune", words, tmp_path)
    found = read_json(tmp_path / "run/minutes.json")
    assert timed.count == 1
    assert found == {"minutes": 10, "steps": 12, "words": [], "corrected": {}}  # and 3 evaluations
    assert "start: imports" in (tmp_path / "run/log.txt").read_text()
    plain = [word for word in words if not word.startswith(("loop.minutes", "run_dir"))]
    run("finetune", [*plain, "loop.total_steps=12", f"run_dir={tmp_path / 'plain'}"], tmp_path)
    assert_equal_runs(tmp_path / "run", tmp_path / "plain", 12)
    with refuses(r"loop\.minutes: 5, but .*run was planned for 10; set loop\.minutes=10"):
        run("finetune", [*words, "loop.minutes=5", "resume_allow=[loop.minutes]"], tmp_path)


def test_a_run_whose_steps_take_half_as_long_makes_more_and_a_resumed_one_repeats_them(words, tmp_path, monkeypatch):
    words, _ = words
    marks = [0.0]

    def mark(clock, step):
        marks.append(30.0 * min(step, 2) + 19.5 * max(0, step - 2))
        return Mark(step, marks[-1])

    monkeypatch.setattr(Clock, "mark", mark)
    monkeypatch.setattr(pace, "monotonic", lambda: pace.STARTED + 20 + marks[-1])
    monkeypatch.setattr(pace, "_FIRST_SHARE", 0.15)
    run_until_killed("finetune", words, tmp_path, step=10)  # its last checkpoint has 9 steps
    file = tmp_path / "run/minutes.json"
    found = read_json(file)
    steps = found["corrected"]
    assert found["steps"] == 12 and list(steps) == ["2", "8"]
    assert steps["2"] == 14 and steps["8"] in (27, 28)  # evaluations count as they were
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/minutes.json").write_bytes(file.read_bytes())
    run("finetune", words, tmp_path)
    assert read_json(file) == found
    run("finetune", [*words, f"run_dir={tmp_path / 'whole'}"], tmp_path)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole", [*steps.values()][-1])


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_the_first_correction_is_right_also_after_the_end_of_the_first_epoch(factor, tmp_path, monkeypatch):
    """A step was measured too short by a factor; the first epoch's last step is before the correction."""
    length = Length(minutes=10, steps=int(600 * factor), words=[])
    plan = SimpleNamespace(phase_ends=(), total_steps=length.steps, evaluations_after=lambda step: 0)
    clock = SimpleNamespace(mark=lambda step: Mark(step, min(step, 50) * 2.0 + max(0, step - 50)))
    run_pace = Pace(tmp_path, length, Mark(), Speed(2 / factor, 1 / factor, 50), 0.0)
    for step in range(1, int(0.16 * length.steps)):
        monkeypatch.setattr(pace, "monotonic", lambda step=step: pace.STARTED + clock.mark(step).seconds)
        run_pace.steps_at(step, plan, clock, 0.0)
    assert [*length.corrected.values()] == [550]


def test_two_lengths_are_refused(words, tmp_path):
    with refuses(r"loop\.minutes: 10 sets the length, and so does loop\.total_epochs=3"):
        run("finetune", [*words[0], "loop.total_epochs=3"], tmp_path)
    assert not (tmp_path / "run/minutes.json").exists()


def test_minutes_that_are_too_few_end_no_run(words, tmp_path, capsys):
    run("finetune", [*words[0], "loop.minutes=0.5"], tmp_path)
    said = capsys.readouterr().err
    assert "loop.minutes: 0.5 are too few: the run takes about 67.5 s more" in said and "top-1" in said
    assert read_json(tmp_path / "run/minutes.json")["steps"] == 1


def test_a_refitted_head_is_the_result_if_no_step_fits(words, tmp_path):
    run("finetune", [*words[0], "task.head=refitted", "loop.minutes=0.5"], tmp_path)
    assert read_json(tmp_path / "run/minutes.json")["steps"] == 1


def test_how_sure_the_best_figure_is_and_what_is_easy_are_said(words, tmp_path, capsys):
    run("finetune", [*words[0], "loop.minutes=2"], tmp_path)
    said = capsys.readouterr().err
    assert "1 steps, 0.5 epochs" in said
    found = read_json(tmp_path / "run/result.json")
    (low, high), value = found["interval"], found["value"]
    assert low < value < high and f"top-1 {value:.4g} (95 % interval: {low:.4g} to {high:.4g})" in said
    assert ", always one class 0.5" in said and re.search(r"by class +\w+ \d of 2 right, ", said)
    run("finetune", [*words[0], "loop.minutes=2"], tmp_path)  # a complete run keeps it
    assert read_json(tmp_path / "run/result.json") == found
