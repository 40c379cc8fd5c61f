"""Damaged records beside good checkpoints: a run goes on after a warning, or ends with one line; never a traceback."""

import os
import shutil

import pytest

from tests.in_process import TINY, make_images, run, run_command
from tests.support import at_most

SETTINGS = [*TINY, "data.root=images", "run_dir=run", "loop.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of four steps."""
    folder = tmp_path_factory.mktemp("damage")
    make_images(folder / "images")
    run("finetune", [*SETTINGS, "loop.total_steps=4", "loop.ema_decay=0.9"], folder)
    return folder


def write(content):
    return lambda path: path.write_bytes(content)


def as_folder(path):
    path.mkdir()


def as_dangling_link(path):
    path.symlink_to("nowhere")


def as_fifo(path):
    os.mkfifo(path)


DAMAGE = {
    "empty": write(b""),
    "cut": None,
    "list": write(b"[]\n"),
    "nan": write(b"NaN\n"),
    "text": write(b'"text"\n'),
    "number": write(b"1" * 5000 + b"\n"),
    "not UTF-8": write(b"\xff\xfe{}\n"),
    "nested": write(b"[" * 100_000 + b"\n"),
    "NULs": write(b"\0" * 300 + b"\n"),
    "without keys": write(b"{}\n"),
    "wrong types": write(b'{"step": "4", "kind": 3, "path": [], "script": 1, "data": 7, "seed": null}\n'),
    "folder": as_folder,
    "dangling link": as_dangling_link,
    "FIFO": as_fifo,
}
FOLDERS = ("plots", "tables", "weights")
FILES = (
    "config.json", "metrics.jsonl", "skipped_steps.jsonl", "unreadable.jsonl", "log.txt", "training_log.txt",
    "overrides.txt", "environment.json", "result.json", "complete.json", *FOLDERS,
)  # fmt: skip
COMMANDS = {
    "resume": ("finetune", [*SETTINGS, "loop.total_steps=5", "loop.ema_decay=0.9"]),
    "evaluate": ("evaluate", ["run_dir=run", "runtime.device=cpu"]),
    "predict": ("predict", ["weights=run", "input=images/val", "output=found.jsonl", "device=cpu"]),
    "export": ("export", ["format=safetensors", "run_dir=run"]),
}


def damage(place, target, files, kind):
    """Copy the place, with some files of the run damaged."""
    for name in ("images", "run"):
        shutil.copytree(place / name, target / name, symlinks=True)
    for path in [target / "run" / file for file in files]:
        before = path.read_bytes() if path.is_file() else b""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if kind == "cut":
            path.write_bytes(before[: len(before) // 2])
        else:
            DAMAGE[kind](path)


@pytest.fixture
def commands(place, tmp_path, monkeypatch, capsys):
    """Return what runs every command, each on a damaged copy of the run, and returns {command: (status, stderr)}."""

    def run_all(files, kind):
        found = {}
        for name, (script, words) in COMMANDS.items():
            folder = tmp_path / name
            folder.mkdir()
            damage(place, folder, files, kind)
            with at_most(60):
                status = run_command(script, words, folder, monkeypatch)
            found[name] = (status, capsys.readouterr().err)
            assert "Traceback" not in found[name][1] and status in (0, 2), (name, found[name])
        return found

    return run_all


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records(kind, commands):
    """All of them at once: the run goes on from its checkpoint, and names each file that it sets aside."""
    status, said = commands(FILES, kind)["resume"]
    assert status == 0
    assert "resumed from run/checkpoints/step_00000004" in said
    in_place = {
        "folder": FILES[:-3],
        "FIFO": FILES,
        "dangling link": FILES,
        "without keys": FOLDERS,
        "wrong types": FOLDERS,
    }
    for file in in_place.get(kind, ("config.json", *FOLDERS)):
        assert f"run/{file} is" in said
