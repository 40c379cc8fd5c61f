"""Live plots: a growing file followed, refusals, and a process that ends with its run."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.in_process import TINY, make_images, run
from tests.support import ROOT, rows, start
from utils.record import live_plot
from utils.record.live_plot import LivePlots, follow, main
from utils.record.run_config import mark_complete


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
        if row is None:
            mark_complete(folder, 400)
        else:
            add_rows(folder, [row])
        return False

    follow(folder, wait, until_complete=True)
    assert [count for _, count in drawn] == pytest.approx([1, 12, 22, 33, 43, 44], abs=2) and drawn[-1][1] == 44
    assert all(later - earlier >= 10.5 for (earlier, _), (later, _) in zip(drawn[:-2], drawn[1:-1]))


def test_without_new_rows_nothing_is_drawn_again(paced):
    folder, clock, drawn = paced
    add_rows(folder, make_rows())

    def wait(seconds):
        clock["now"] += 100
        return clock["now"] > 5000

    follow(folder, wait, until_complete=False)
    assert len(drawn) == 1


def test_a_removed_folder_is_not_made_again(paced):
    folder, _, drawn = paced
    add_rows(folder, make_rows())
    (folder / "config.json").unlink()
    follow(folder, lambda _: False, until_complete=False)
    assert drawn == [] and not (folder / "plots").exists()


# ----------------------------------------------------------------------------------------------------- from the outside


def make_other(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def make_damaged(folder):
    (make_run(folder) / "metrics.jsonl").write_text("nothing\n")


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "is not a run folder"),
        (make_other, "not the folder of a training run"),
        (make_run, "metrics.jsonl has no row yet"),
        (make_damaged, "is damaged; remove that line"),
    ],
    ids=["missing", "no training", "no row", "damaged"],
)
def test_what_is_no_run_is_refused_with_status_2(prepare, message, tmp_path, capsys):
    folder = tmp_path / "run"
    prepare(folder)
    assert main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("live_plot: run_dir: ") and message in said
    assert not (folder / "plots").exists()


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    make_run(folder)
    add_rows(folder, make_rows())
    monkeypatch.setattr("utils.record.live_plot.os.access", lambda path, mode: False)
    assert main([str(folder)]) == 2
    assert f"live_plot: run_dir: {folder / 'plots'} may not be written by this user" in capsys.readouterr().err


def run_module(folder, **more):
    """Start the command; it hears Ctrl-C even where these tests run in a shell's background, which ignores it."""
    command = [sys.executable, "-m", "utils.record.live_plot", str(folder)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=hear, **more)


def wait_for(condition, seconds=60):
    """Wait until a condition holds; returns whether it does."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def test_the_command_draws_what_is_there_and_ends_at_ctrl_c_or_with_the_run(tmp_path):
    folder = make_run(tmp_path / "run", make_rows())
    process = run_module(folder, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: (folder / "plots/curves.png").exists())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[0].endswith("until the run is complete; Ctrl-C ends it")
    assert process.returncode == 0
    mark_complete(folder, 400)
    process = run_module(folder, stderr=subprocess.PIPE, text=True)
    process.communicate(timeout=60)
    assert process.returncode == 0


# ------------------------------------------------------------------------------------------------------------ in a run


def is_running(pid):
    """Return whether a process runs, zombies aside."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def find_drawers(folder):
    """Return the processes that draw a run's live plots."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                arguments = stream.read().split(b"\0")
        except OSError:
            continue
        if b"utils.record.live_plot" in arguments and str(folder).encode() in arguments and is_running(pid):
            found.append(int(pid))
    return found


def test_the_process_ignores_the_signals_of_a_run_and_ends_with_its_pipe(tmp_path):
    folder = make_run(tmp_path / "run", make_rows()[:5])
    live = LivePlots(folder)
    assert wait_for(lambda: (folder / "plots/curves.png").exists())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(live._process.pid, number)
    assert os.getsid(live._process.pid) != os.getsid(0)
    own, its = (os.getpriority(os.PRIO_PROCESS, process) for process in (0, live._process.pid))
    assert its == min(19, own + 10)
    time.sleep(0.2)
    live.check()
    before = (folder / "plots/curves.png").read_bytes()
    add_rows(folder, make_rows()[5:])
    live.close()
    assert live._process.returncode == 0 and (folder / "plots/curves.png").read_bytes() != before
    assert not live_plot._pipes


def test_a_process_that_dies_is_one_warning(tmp_path, log):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("nothing\n")
    live = LivePlots(folder)
    assert wait_for(lambda: live._process.poll() is not None)
    for _ in range(3):
        live.check()
    live.close()
    (text,) = log.messages
    assert text.startswith("tracking.live_plots: the process that draws has ended with status 2 (live_plot: run_dir: ")
    assert text.endswith(live_plot.command_for(folder))


PARENT = """
import os, sys, time
from pathlib import Path
from utils.record.live_plot import LivePlots
live = LivePlots(Path(sys.argv[1]))
worker = os.fork()
if worker == 0:
    time.sleep(600)
print(worker, flush=True)
time.sleep(600)
"""


def test_a_killed_parent_leaves_no_process_behind_though_its_worker_lives(tmp_path):
    folder = make_run(tmp_path / "run", make_rows())
    with subprocess.Popen([sys.executable, "-c", PARENT, folder], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())
        try:
            assert wait_for(lambda: (folder / "plots/curves.png").exists()) and len(find_drawers(folder)) == 1
            parent.kill()
            parent.wait()
            assert wait_for(lambda: not find_drawers(folder)) and is_running(worker)
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("live") / "images")


LIVE = ["tracking.live_plots=true", "schedule=onecycle", "run_dir=run"]


def test_a_run_draws_its_live_plots_and_is_the_same_run(images, tmp_path):
    (tmp_path / "without").mkdir()
    for folder, more in ((tmp_path, LIVE), (tmp_path / "without", [*LIVE, "tracking.live_plots=false"])):
        run("finetune", [*TINY, f"data.root={images}", "loop.total_steps=4", *more], folder)
    folder = tmp_path / "run"
    assert (folder / "plots/curves.png").exists()
    assert rows(folder / "metrics.jsonl") == rows(tmp_path / "without/run/metrics.jsonl")
    assert not find_drawers(folder) and json.loads((folder / "complete.json").read_text()) == {"step": 4}
    assert main([str(folder)]) == 0


def test_a_killed_run_leaves_no_process_behind(images, tmp_path):
    overrides = [*TINY, f"data.root={images}", "loop.total_steps=400", *LIVE]
    started = start("finetune.py", overrides, tmp_path, kill_at_step=60)
    started.wait()
    folder = tmp_path / "run"
    assert wait_for(lambda: not find_drawers(folder)) and not (folder / "complete.json").exists()
    assert wait_for(lambda: (folder / "plots/curves.png").exists(), 1)
