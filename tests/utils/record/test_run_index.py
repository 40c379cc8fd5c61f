"""Runs below a folder, each with its state."""

import json
import os
from pathlib import Path

import pytest

from tests.utils.record.test_curves import line
from utils.io.files import file_lock, write_json
from utils.record.run_index import RunIndex


def said(state, step=4, **more):
    return json.dumps({"state": state, "step": step, "total_steps": 20, "left_sec": 42.0, **more})


def make_run(path, log="", **files):
    (path / "weights").mkdir(parents=True)
    config = {"script": "finetune", "task": {"name": "tagging"}, "model": {"name": "<b>net</b>"}}
    write_json(path / "config.json", config)
    (path / "log.txt").write_text(log)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    return path


def test_states_steps_and_results(tmp_path):
    result = '{"metric": "mAP", "value": 0.5, "step": 4, "is_lowest_best": false}'
    finished = {"complete_json": "{}", "metrics_jsonl": line(20, loss=1.5)}
    odd = said([], float("nan"), left_sec=10**400, total_steps="x")
    progress = {"b": said("stopped"), "c": said("running"), "requeued": said("requeued"), "failed": said("failed")}
    for name, text in {**progress, "damaged": odd}.items():
        make_run(tmp_path / name, progress_json=text)
    make_run(tmp_path / "sweep/a=1", progress_json=said("finished", 20), **finished)
    running = make_run(tmp_path / "d", progress_json=said("running", 7, best=0.25), result_json=result)
    make_run(tmp_path / "older/finished", **finished)
    make_run(tmp_path / "older/other", metrics_jsonl=line(3, loss=1.5))
    (tmp_path / "e/weights").mkdir(parents=True)  # no configuration
    make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    make_run(tmp_path / "f").joinpath("config.json").write_text("[")
    make_run(tmp_path / "damaged=1").joinpath("overrides.txt").write_bytes(b"\xff=1")
    with file_lock(running / ".lock", "busy"):
        states = {state.path.name: state for state in RunIndex([tmp_path]).states()}
    assert {name: state.state for name, state in states.items()} == {
        "a=1": "finished", "b": "stopped", "c": "dead", "d": "running", "requeued": "requeued", "failed": "failed",
        "finished": "finished", "other": "stopped", "damaged": "dead",
    }  # fmt: skip
    assert (states["d"].step, states["d"].total, states["d"].left_sec, states["d"].best) == (7, 20, 42.0, 0.25)
    assert (states["other"].step, states["other"].total, states["damaged"].step) == (3, None, 0)
    assert states["a=1"].spark == (1.5,) and states["a=1"].task == "tagging" and states["b"].left_sec is None
    assert states["a=1"].job.state == "finished" and states["b"].job is None


@pytest.mark.parametrize("name", ["config.json", "log.txt", "metrics.jsonl", "plots"])
def test_a_run_whose_files_lie_elsewhere_is_none(tmp_path, name):
    make_run(tmp_path / "other", metrics_jsonl="")
    (tmp_path / "other/plots").mkdir()
    run = make_run(tmp_path / "runs/run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "other" / name)
    assert RunIndex([tmp_path / "runs"]).states() == []
