"""Live plots: a growing file followed, and a process that ends with its run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT
from utils.record import live_plot
from utils.record.live_plot import LivePlots, follow


def make_rows():
    """Return 40 rows of training, 10 steps apart and 40 steps an epoch, and an evaluation every 100 steps."""
    made = []
    for step in range(10, 401, 10):
        made.append({"step": step, "kind": "train", "epoch": step / 40, "loss": 40.0 / step, "lr": 0.1})
        if step % 100 == 0:
            made.append({"step": step, "kind": "evaluate", "epoch": step / 40, "loss": 50.0 / step, "top1": step / 500})
    return made


def make_run(folder, made=()):
    """Make what a run has in its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"loop": {"log_every_steps": 20}}))
    if made:
        add_rows(folder, made)
    return folder


def add_rows(folder, made):
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in made)


# ------------------------------------------------------------------------------------------------------- growing files


@pytest.fixture
def paced(tmp_path, monkeypatch):
    """Return (a run folder, a clock, the times of drawings): a drawing takes half a second of that clock."""
    clock, drawn = {"now": 100.0}, []

    def draw(made, path, name):
        drawn.append((clock["now"], len(made.rows)))
        clock["now"] += 0.5

    monkeypatch.setattr("utils.record.plots.plot_curves", draw)
    monkeypatch.setattr(live_plot.time, "monotonic", lambda: clock["now"])
    return make_run(tmp_path / "run"), clock, drawn


def test_rows_are_drawn_in_a_twentieth_of_the_time_and_the_last_ones_always(paced):
    folder, clock, drawn = paced
    made = iter(make_rows())

    def wait(seconds):
        clock["now"] += seconds
        row = next(made, None)
        if row is not None:
            add_rows(folder, [row])
        return row is None

    follow(folder, wait)
    assert [count for _, count in drawn] == pytest.approx([0, 12, 22, 33, 43, 44], abs=2) and drawn[-1][1] == 44
    assert all(later - earlier >= 10.5 for (earlier, _), (later, _) in zip(drawn[:-2], drawn[1:-1]))


def test_a_removed_folder_is_not_made_again(paced):
    folder, _, drawn = paced
    (folder / "config.json").unlink()
    follow(folder, lambda seconds: False)
    assert drawn == []


# ------------------------------------------------------------------------------------------------------ the process


def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_the_process_draws_ignores_the_signals_of_a_run_and_draws_the_last_rows(tmp_path):
    folder = make_run(tmp_path / "run", make_rows()[:20])
    picture, live = folder / "plots/curves.png", LivePlots(folder)
    wait_until(picture.exists)
    first = picture.read_bytes()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        live._process.send_signal(number)
    add_rows(folder, make_rows()[20:])
    live.close()
    assert live._process.returncode == 0 and picture.read_bytes() != first


def test_a_process_that_dies_is_one_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(live_plot.log, "warning", lambda *words: said.append(words))
    live = LivePlots(make_run(tmp_path / "run"))
    live._process.kill()
    live._process.wait()
    live.check()
    live.close()
    assert len(said) == 1 and said[0][1] == -signal.SIGKILL


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    folder = make_run(tmp_path / "run", make_rows())
    code = (
        "import os, time; from pathlib import Path; from utils.record.live_plot import LivePlots; "
        f"live = LivePlots(Path({str(folder)!r})); print(live._process.pid, flush=True); os.fork(); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pid = int(parent.stdout.readline())
    wait_until((folder / "plots/curves.png").exists)
    parent.kill()
    parent.wait()

    def is_gone():
        try:
            return "\nState:\tZ" in open(f"/proc/{pid}/status").read()
        except FileNotFoundError:
            return True

    wait_until(is_gone)
    os.killpg(parent.pid, signal.SIGKILL)  # its worker
