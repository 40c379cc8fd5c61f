"""Live plots: a process that draws as a file grows, and ends with its run."""

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


def add_rows(folder, first, last):
    """Add rows of training, 10 steps apart and 40 steps an epoch."""
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as stream:
        for step in range(first, last, 10):
            row = {"step": step, "kind": "train", "epoch": step / 40, "loss": 40.0 / step, "lr": 0.1}
            stream.write(json.dumps(row) + "\n")


def test_rows_are_drawn_in_a_twentieth_of_the_time(tmp_path, monkeypatch):
    clock, drawn = {"now": 100.0}, []

    def draw(made, path, name):
        drawn.append((clock["now"], len(made.rows)))
        clock["now"] += 0.5

    def sleep(seconds):
        clock["now"] += seconds
        add_rows(tmp_path, int(clock["now"]) * 10, int(clock["now"]) * 10 + 10)
        if len(drawn) == 4:
            monkeypatch.setattr(live_plot.os, "getppid", lambda: 1)

    monkeypatch.setattr("utils.record.plots.plot_curves", draw)
    monkeypatch.setattr(live_plot.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(live_plot.time, "sleep", sleep)
    follow(tmp_path, os.getppid())
    assert [count for _, count in drawn] == [1, 2, 3, 4]
    assert all(later - earlier >= 10.5 for (earlier, _), (later, _) in zip(drawn, drawn[1:]))


def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("end", ["close", "signal"])
def test_the_process_draws_until_it_is_closed_or_dies(tmp_path, end):
    add_rows(tmp_path, 10, 200)
    live = LivePlots(tmp_path)
    wait_until((tmp_path / "plots/curves.png").exists)
    assert live.is_drawing
    live.close() if end == "close" else live._process.send_signal(signal.SIGUSR2)
    wait_until(lambda: not live.is_drawing)
    assert live._process.returncode == 0 and os.listdir(tmp_path / "plots") == ["curves.png"]
    live.close()


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    add_rows(tmp_path, 10, 200)
    code = (
        "import os, time; from pathlib import Path; from utils.record.live_plot import LivePlots; "
        f"live = LivePlots(Path({str(tmp_path)!r})); print(live._process.pid, flush=True); os.fork(); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pid = int(parent.stdout.readline())
    wait_until((tmp_path / "plots/curves.png").exists)
    parent.kill()
    parent.wait()

    def is_gone():
        try:
            return "\nState:\tZ" in open(f"/proc/{pid}/status").read()
        except FileNotFoundError:
            return True

    wait_until(is_gone)
    os.killpg(parent.pid, signal.SIGKILL)  # its worker
