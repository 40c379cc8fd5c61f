"""Damaged records beside good checkpoints: a run goes on, and the other commands name the file; never a traceback."""

import shutil

import pytest

from tests.in_process import TINY, make_images, run, run_command

SETTINGS = [*TINY, "data.root=images", "run_dir=run"]
DAMAGE = {
    "cut": b'{"script": "finetune", "da',
    "not UTF-8": b"\xff\xfe{}\n",
    "NULs": b"\0" * 300 + b"\n",
    "wrong types": b'{"step": "4", "kind": 3, "path": [], "script": 1, "data": 7, "seed": null}\n',
}
FILES = (
    "config.json", "metrics.jsonl", "skipped_steps.jsonl", "unreadable.jsonl", "log.txt", "training_log.txt",
    "overrides.txt", "environment.json", "result.json", "complete.json",
    "progress.json",
)  # fmt: skip
COMMANDS = {
    "evaluate": ["run_dir=run", "runtime.device=cpu"],
    "predict": ["weights=run", "input=images/val", "output=found.jsonl", "device=cpu"],
    "export": ["format=safetensors", "run_dir=run"],
    "finetune": [*SETTINGS, "loop.total_steps=5", "loop.ema_decay=0.9"],
}


@pytest.fixture(scope="module")
def place(folder):
    make_images(folder / "images")
    run("finetune", [*SETTINGS, "loop.total_steps=4", "loop.ema_decay=0.9"], folder)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records(kind, place, tmp_path, monkeypatch, capsys):
    for name in ("images", "run"):
        shutil.copytree(place / name, tmp_path / name)
    for file in FILES:
        (tmp_path / "run" / file).write_bytes(DAMAGE[kind])
    for script, words in COMMANDS.items():
        status, said = run_command(script, words, tmp_path, monkeypatch), capsys.readouterr().err
        assert "Traceback" not in said and status == (2 if script == "evaluate" else 0), (script, said)
        if script == "evaluate":
            assert "run_dir: run/config.json is not a readable JSON file" in said
    assert "resumed from run/checkpoints/step_00000004" in said
