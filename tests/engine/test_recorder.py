"""The recorder: when curves are drawn, the readings of epoch rows, the mark of a complete run.

What it writes is tested with whole runs, too (test_survival, test_exactness).
"""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

import engine.run.recorder
import engine.run.summary
import utils.record.plots
from engine.plan import Plan
from engine.run.recorder import Recorder
from engine.task import Report
from engine.update.runtime import choose_runtime
from optim.schedules import GroupValues
from tests.in_process import SHORT, SMALL_MODEL, TINY, configure, make_images, run
from tests.support import logged, read_table, rows
from utils.io.files import read_json
from utils.record.run_reader import RunReader

PICTURE = np.zeros((4, 4, 3), np.uint8)
STREAM = SimpleNamespace(readings=dict, path_of=str)


def make_recorder(folder, momentum=None, *overrides):
    """Return a recorder of a run of 100 steps of 8 images, 10 steps an epoch."""
    config, _ = configure("finetune", [*SMALL_MODEL, *SHORT, *overrides])
    plan = Plan(1, 8, 8, 1, 80, 100, 0, 1e-3)
    schedule = SimpleNamespace(at=lambda step: GroupValues(0.5, 0.0, momentum))
    learner = SimpleNamespace(
        plan=plan,
        schedule=schedule,
        runtime=choose_runtime(config.runtime),
        optimizer=SimpleNamespace(param_groups=[{}]),
        task=SimpleNamespace(best_metric="loss"),
    )
    return Recorder(config, learner, folder)


@pytest.fixture
def clock(monkeypatch):
    """Return a clock to set, which the recorder and its meters read."""
    now = {"now": 1000.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["now"])
    return now


def test_curves_are_drawn_in_a_fiftieth_of_the_time(tmp_path, clock, monkeypatch):
    recorder, drawn = make_recorder(tmp_path), []
    recorder.open(0, STREAM, {})

    def draw(*_):
        clock["now"] += 1.0
        drawn.append(clock["now"])

    monkeypatch.setattr(utils.record.plots, "plot_curves", draw)
    for step in range(1, 100):
        clock["now"] += 2.0
        recorder.plot(step, draws=recorder.may_draw(step))
    assert len(drawn) == pytest.approx(96 * 2 / 51, abs=2)
    recorder.plot(100, draws=recorder.may_draw(100))  # the last one is always drawn
    assert drawn[-1] == clock["now"]
    recorder.close()


def test_pictures_that_take_time_are_drawn_with_the_curves(tmp_path, clock, monkeypatch):
    recorder, report = make_recorder(tmp_path), Report(images={"made": PICTURE, "slow": lambda: PICTURE})
    recorder.add_report(10, report, draws=False)
    assert [path.name for path in (tmp_path / "plots").glob("*.png")] == ["made.png"]
    recorder.add_report(20, report, draws=True)
    assert {path.name for path in (tmp_path / "plots/steps/00000020").iterdir()} == {"made.png", "slow.png"}


def train_to(recorder, clock, first, last, evaluation=5.0):
    """Pass steps of 0.2 s each, then an evaluation."""
    for step in range(first, last):
        recorder.enters(step, "loading")
        clock["now"] += 0.15
        recorder.enters(step, "computing")
        clock["now"] += 0.05
    recorder._step = last
    recorder.enters(last, "evaluating")
    clock["now"] += evaluation


def last_row(recorder):
    return recorder._metrics.rows[-1]


def test_a_start_from_zero_keeps_no_row_of_a_killed_one(tmp_path):
    """A kill between the evaluation and the checkpoint. What a checkpoint of step 0 has stays in a longer run."""
    images = make_images(tmp_path / "images")
    words = [*TINY, f"data.root={images}", "run_dir=run", "resume_allow=[loop]"]
    run("finetune", [*words, "loop.total_steps=0"], tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints")
    run("finetune", [*words, "loop.total_steps=0"], tmp_path)
    assert logged(tmp_path / "run", "evaluate", "step") == [0]
    run("finetune", words, tmp_path)
    assert logged(tmp_path / "run", "evaluate", "step") == [0, 2]
    assert read_json(tmp_path / "run/progress.json")["best"] == read_json(tmp_path / "run/result.json")["value"]


def test_the_seconds_go_on_after_a_resumption_within_an_epoch(tmp_path, clock):
    recorder = make_recorder(tmp_path)
    recorder.open(0, STREAM, {})
    train_to(recorder, clock, 0, 10)
    recorder.end_epoch(10, 0, {})
    train_to(recorder, clock, 10, 14)
    state = {"step": 14, **json.loads(json.dumps(recorder.state()))}
    recorder.close()
    clock["now"] += 1e6
    recorder = make_recorder(tmp_path)
    recorder.load_state(state)
    recorder.open(14, STREAM, {})
    train_to(recorder, clock, 14, 20)
    recorder.end_epoch(20, 1, {})
    assert last_row(recorder)["seconds"] == pytest.approx(4.0)
    assert last_row(recorder)["images_per_sec"] == pytest.approx(8 / 0.2)
    assert "momentum" not in last_row(recorder)
    recorder.close()


def read_log(folder):
    return read_table(folder / "run/training_log.txt")


def test_an_epoch_that_an_end_has_cut_has_one_row(tmp_path):
    """Two steps an epoch: a run of three steps that goes on to five and six has the rows of one of six."""
    images = make_images(tmp_path / "images")
    common = [*TINY, f"data.root={images}", "run_dir=run", "schedule=onecycle", "task.label_smoothing=0"]
    run("finetune", [*common, "loop.total_steps=3"], tmp_path)
    part = read_log(tmp_path)
    assert [(line["step"], line["epoch"]) for line in part] == [("2", "1"), ("3", "2")]
    run("finetune", [*common, "loop.total_steps=3"], tmp_path)  # a complete run does nothing
    assert read_log(tmp_path) == part
    for steps in (5, 6):
        run("finetune", [*common, f"loop.total_steps={steps}"], tmp_path)
        assert read_json(tmp_path / "run/complete.json") == {"step": steps}
    lines = read_log(tmp_path)
    assert [(line["step"], line["epoch"]) for line in lines] == [("2", "1"), ("4", "2"), ("6", "3")]
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "epoch")] == [2, 4, 6]
    losses = logged(tmp_path / "run", "train", "loss")
    means = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2])]
    assert [float(line["train_loss"]) for line in lines] == pytest.approx(means, rel=1e-5)
    columns = "epoch train_loss train_accuracy val_loss top1 lr momentum images_per_sec seconds peak_memory_gib"
    assert {*columns.split()} <= {*lines[0]}
    assert all(float(line[name]) >= 0 for line in lines for name in columns.split())


def test_a_run_records_its_waits_and_caches_and_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.run.summary, "_MUCH_WAITING", 0.0)
    root = make_images(tmp_path / "images")
    command = [*SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={root}", "loop.total_steps=6", "run_dir=run"]
    run("finetune", command, tmp_path)
    found = [row for row in RunReader(tmp_path / "run").rows if row["kind"] == "train"]
    rates = [row["data/l1_hit_rate"] for row in found]
    assert rates == sorted(rates) and 0 < rates[-1] < 1
    assert all(row["data/l1_gib"] > 0 and row["data/wait_sec"] >= 0 for row in found) and found[-1]["data/wait_sec"] > 0
    assert "was spent waiting for data: " in (tmp_path / "run/log.txt").read_text()


def test_a_tracker_gets_the_pictures_of_the_base_as_step_zero_of_the_same_slider_and_tables(tmp_path):
    recorder, sent = object.__new__(Recorder), []
    recorder.folder, recorder._tracker = tmp_path, SimpleNamespace(add=lambda *values: sent.append(values))
    picture, table = np.zeros((2, 2, 3), np.uint8), [{"class": "a", "recall": 1.0}]
    recorder.add_report(0, Report(images={"samples_before": picture}), draws=False)
    recorder.add_report(5, Report({}, {"classes": table}, {"samples": picture}), draws=False)
    assert [(step, [*values]) for step, values in sent] == [
        (0, ["images/samples"]),
        (5, ["images/samples", "tables/classes"]),
    ]
