"""Trackers: what W&B is given, and what is in TensorBoard's event files; a tracker ends no run."""

import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from tests.in_process import TINY, make_images, run
from tests.support import is_reading, rows
from utils.io.files import read_json, write_json
from utils.record.run_reader import RunReader
from utils.record.trackers import _WRITERS, Tracker, _Wandb, choose_mode

KEY = "0123456789abcdef" * 2 + "01234567"
WANDB = ["tracking=wandb", "tracking.project=tests"]


@pytest.fixture(scope="module")
def images(folder):
    return make_images(folder / "images")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Keep the user's own W&B settings out; a key is there, which no file may hold."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def fine_tune(images, folder, *overrides):
    return run("finetune", [*TINY, f"data.root={images}", "run_dir=run", *overrides], folder)


@pytest.fixture(scope="module")
def plain(images, folder):
    """Return the run folder of three steps without a tracker."""
    fine_tune(images, folder, "loop.total_steps=3")
    return folder / "run"


def expected_rows(run_dir):
    """Return step -> the figures that a tracker must have, without readings of the machine."""
    found = {}
    for row in rows(run_dir / "metrics.jsonl"):
        figures = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        found.setdefault(row["step"], {}).update({f"{row['kind']}/{name}": value for name, value in figures.items()})
    return {step: {name: value for name, value in row.items() if not is_reading(name)} for step, row in found.items()}


# ---------------------------------------------------------------------------------------------------------------- W&B


def test_wandb_offline_has_the_config_and_every_row_once_over_a_resumption(images, plain, tmp_path, monkeypatch):
    logged, log = {}, wandb.Run.log  # for each start of a run, the rows by their steps

    def note(run, values, step):
        logged.setdefault(run, {}).setdefault(step, {}).update(values)
        log(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", note)
    monkeypatch.setattr("sys.argv", ["finetune.py", f"data.token={KEY}"])
    monkeypatch.setenv("WANDB_TAGS", "small,glyphs")
    fine_tune(images, tmp_path, "loop.total_steps=3", "loop.checkpoint_every_steps=2", "tracking.weights=true", *WANDB)
    run_dir = tmp_path / "run"
    (first,) = logged
    assert "tracking: " not in (run_dir / "log.txt").read_text()
    assert (first.name, first.project, first.tags) == ("run", "tests", ("small", "glyphs"))
    assert first.id == (run_dir / "wandb_run_id.txt").read_text().strip()
    git = read_json(run_dir / "environment.json")["git"]
    assert dict(first.config) == {**read_json(run_dir / "config.json"), "git": git}
    figures = {step: {name: row[name] for name in row if not is_reading(name)} for step, row in logged[first].items()}
    shown = {
        name: row.pop(name) for row in figures.values() for name in [*row] if name.startswith(("images/", "tables/"))
    }
    assert figures == expected_rows(run_dir) and "images/confusion" in shown
    table = shown["tables/classes"]
    assert table.columns[0] == "class" and [row[0] for row in table.data] == ["A", "B"]
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/**/confusion_*.png"))
    assert rows(run_dir / "metrics.jsonl") == rows(plain / "metrics.jsonl")

    (run_dir / "checkpoints/step_00000003/state.json").write_text("{")  # damaged: the run goes back to step 2
    fine_tune(images, tmp_path, "loop.total_steps=5", *WANDB)
    first, second = logged
    assert second.id == first.id and [max(logged[first]), *logged[second]] == [3, 4, 5]
    assert second.config["loop"]["total_steps"] == 5 and list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_wandb_has_the_objective_of_a_sweep_and_the_weights_if_asked(images, tmp_path, monkeypatch):
    sent, runs, finish = [], [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "log_model", lambda run, *arguments: sent.append(arguments))
    monkeypatch.setattr(
        wandb.Run, "finish", lambda run, **how: [runs.append(run.summary["objective"]), finish(run, **how)]
    )
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    fine_tune(images, tmp_path, "loop.total_steps=2", *WANDB)
    assert not sent and (tmp_path / "run/wandb_run_id.txt").read_text() == "fromagent\n"
    assert runs == [read_json(tmp_path / "run/result.json")["value"]]
    fine_tune(images, tmp_path, "loop.total_steps=2", "run_dir=sent", "tracking.weights=true", *WANDB)
    files = [Path(f"sent/weights/{name}_weights.safetensors") for name in ("best", "last")]
    assert sent == [(files[0], "weights-fromagent", ["best"]), (files[1], "weights-fromagent", ["latest"])]


def test_the_objective_is_highest_where_the_run_is_best(tmp_path):
    write_json(tmp_path / "result.json", {"metric": "m", "value": 0.5, "is_lowest_best": True})
    assert RunReader(tmp_path).objective == -0.5


def test_a_server_that_never_answers_ends_no_run(images, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait for ever
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setattr("utils.record.trackers._START_SEC", 3.0)
        fine_tune(images, tmp_path, "loop.total_steps=2", "tracking=wandb")
    assert len(rows(tmp_path / "run/metrics.jsonl", "train")) == 2
    assert "tracking: wandb cannot be started" in (tmp_path / "run/log.txt").read_text()


def test_the_mode_is_chosen_by_what_is_there(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    for has_key, mode in ((True, "online"), (False, "offline")):
        monkeypatch.setattr("wandb.login", lambda has_key=has_key, **how: has_key)
        assert choose_mode() == mode
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode() == "disabled"


def test_a_run_that_was_stopped_waits_a_few_seconds_for_wandb(monkeypatch):
    monkeypatch.setattr("utils.record.trackers._STOP_SEC", 0.1)
    writer, asked = object.__new__(_Wandb), threading.Event()
    writer._run = SimpleNamespace(finish=lambda: [asked.set(), time.sleep(60)])
    began = time.monotonic()
    monkeypatch.setitem(_WRITERS, "wandb", lambda *_: writer)
    Tracker("wandb", None, None, 0).close(None)
    assert asked.is_set() and time.monotonic() - began < 30


# -------------------------------------------------------------------------------------------------------- TensorBoard


def read_events(run_dir):
    """Return the scalars as (name, step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert "images/confusion" in events.Tags()["images"]
    return [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]


def test_tensorboard_has_every_row_once_over_a_resumption_and_changes_nothing(images, plain, tmp_path):
    settings = ["loop.checkpoint_every_steps=2", "tracking=tensorboard"]
    fine_tune(images, tmp_path, "loop.total_steps=3", *settings)
    assert rows(tmp_path / "run/metrics.jsonl") == rows(plain / "metrics.jsonl")
    (tmp_path / "run/checkpoints/step_00000003/state.json").write_text("{")
    fine_tune(images, tmp_path, "loop.total_steps=5", *settings)
    scalars = read_events(tmp_path / "run")
    found = {(name, step): value for name, step, value in scalars if not is_reading(name)}
    assert len(found) == sum(not is_reading(name) for name, _, _ in scalars)
    wanted = {
        (name, step): value for step, row in expected_rows(tmp_path / "run").items() for name, value in row.items()
    }
    assert found == pytest.approx(wanted, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- both


def test_a_tracker_that_fails_is_named_once_and_ends_no_run(images, tmp_path, monkeypatch):
    def fail(self, *arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("utils.record.trackers._Tensorboard.add", fail)
    fine_tune(images, tmp_path, "loop.total_steps=3", "tracking=tensorboard")
    (warning,) = re.findall("tracking: .*", (tmp_path / "run/log.txt").read_text())
    assert "TensorBoard failed (OSError('No space left on device'))" in warning
    assert len(rows(tmp_path / "run/metrics.jsonl", "train")) == 3
