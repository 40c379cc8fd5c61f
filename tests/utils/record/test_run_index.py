"""Runs below a folder, each with its state."""

import json

import pytest

from tests.utils.record.test_curves import line
from utils.io.files import file_lock
from utils.record.run_index import RunIndex

STEP = "2026-01-01 00:00:00,000 INFO step {}/20 (epoch 1)  train loss 1.5  lr 0.1  9 images/s  0:42 left\n"


def make_run(path, log="", **files):
    (path / "weights").mkdir(parents=True)
    config = {"script": "finetune", "task": {"name": "tagging"}, "model": {"name": "<b>net</b>"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "log.txt").write_text(log)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    return path


def test_states_steps_and_results(tmp_path):
    stopped = STEP.format(4) + "2026-01-01 00:00:00,000 WARNING stopped at step 5; saved in x\n"
    make_run(tmp_path / "sweep/a", STEP.format(20), complete_json="{}", metrics_jsonl=line(20, loss=1.5))
    make_run(tmp_path / "b", stopped)
    make_run(tmp_path / "c", stopped + STEP.format(6))
    running = make_run(tmp_path / "d", STEP.format(7), result_json=json.dumps(
        {"metric": "mAP", "value": 0.5, "step": 4, "is_lowest_best": False}
    ))  # fmt: skip
    (tmp_path / "e/weights").mkdir(parents=True)  # no configuration
    make_run(tmp_path / "f").joinpath("config.json").write_text("[")
    with file_lock(running / ".lock", "busy"):
        states = {state.path.name: state for state in RunIndex([tmp_path]).states()}
    assert {name: state.state for name, state in states.items()} == {
        "a": "finished", "b": "stopped", "c": "dead", "d": "running",
    }  # fmt: skip
    assert (states["d"].step, states["d"].total, states["d"].left, states["d"].best) == (7, 20, "0:42", 0.5)
    assert states["a"].spark == (1.5,) and states["a"].task == "tagging" and states["b"].left is None


@pytest.mark.parametrize("name", ["config.json", "log.txt", "metrics.jsonl", "plots"])
def test_a_run_whose_files_lie_elsewhere_is_none(tmp_path, name):
    make_run(tmp_path / "other", metrics_jsonl="")
    (tmp_path / "other/plots").mkdir()
    run = make_run(tmp_path / "runs/run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "other" / name)
    assert RunIndex([tmp_path / "runs"]).states() == []
