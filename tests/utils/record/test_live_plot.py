"""Live plots: a growing file followed, the pictures and their marks, refusals, and a process that ends with its run."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import utils.record.live_panels
from tests.in_process import TINY, make_images, run
from tests.support import ROOT, rows, start
from utils.errors import UserError
from utils.record import live_plot, live_process
from utils.record.live_panels import PANELS, draw_live_plots, draw_panel
from utils.record.live_plot import GrowingRows, follow, main
from utils.record.live_process import LivePlots
from utils.record.metrics_log import MetricsLog, Rows
from utils.record.run_config import mark_complete

ACCURACY, LOSS, LR, _ = PANELS
FILES = [panel.file for panel in PANELS]
TOP1 = [0.1, 0.5, 0.7, 0.6]  # best at the third evaluation


def make_rows(ema=False, steep=False, momentum=True):
    """Return 40 rows of training, 10 steps apart and 40 steps an epoch, and an evaluation every 100 steps."""
    made = []
    for number in range(1, 41):
        step = 10 * number
        figures = {
            "epoch": step / 40,
            "loss": 4.0 / number ** (2 if steep else 0.5),
            "accuracy": number / 50,
            "lr": 0.1,
        }
        made.append({"step": step, "kind": "train", **figures} | ({"momentum": 0.9} if momentum else {}))
        if step % 100 == 0:
            top1 = TOP1[step // 100 - 1]
            average = {"ema/loss": 2 - top1, "ema/top1": top1 / 2 if step < 400 else 0.65} if ema else {}
            made.append(
                {"step": step, "kind": "evaluate", "epoch": step / 40, "loss": 1 - top1, "top1": top1, **average}
            )
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


@pytest.fixture
def figures():
    """Close the figures of a test."""
    yield
    plt.close("all")


# --------------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize(
    "made, files",
    [
        (make_rows(ema=True), FILES),
        (make_rows(momentum=False), FILES[:3]),
        (make_rows()[:1], FILES),
        ([{"step": 3, "kind": "evaluate", "epoch": 1.0, "loss": 2.0}], ["loss_live.png"]),
        ([{"step": 3, "kind": "epoch", "epoch": 1, "lr": 0.1}], []),
    ],
    ids=["all", "no momentum", "one row", "an evaluation alone", "an epoch before the first log"],
)
def test_a_picture_for_each_figure_that_the_run_has(made, files, tmp_path):
    assert [path.name for path in draw_live_plots(Rows(made), tmp_path, "$MODEL_$SEED")] == files  # no mathematics
    for file in files:
        with Image.open(tmp_path / file) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (946, 528) and len(np.unique(pixels, axis=0)) > 30
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    "panel, ema, step, value, text",
    [
        (ACCURACY, False, 300, 0.7, "best 0.7: epoch 7.5, step 300"),
        (ACCURACY, True, 400, 0.65, "best 0.65: epoch 10, step 400"),  # of the average, which is what is exported
        (LOSS, False, 300, 0.3, "best 0.3: epoch 7.5, step 300"),
    ],
)
def test_the_best_evaluation_is_marked_with_its_value(panel, ema, step, value, text, figures):
    figure = draw_panel(panel, Rows(make_rows(ema)), "run")
    (axis,) = figure.axes
    (ring,) = [line for line in axis.lines if line.get_label() == "_best"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([step], [pytest.approx(value)])
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == [text]
    assert axis.get_ylim()[0] < value < axis.get_ylim()[1]


NAMES = {
    ACCURACY: ["training 0.8", "validation 0.6", "validation, average 0.65"],
    LOSS: ["training, as optimised 0.6325", "validation 0.4", "validation, average 1.4"],
}


@pytest.mark.parametrize("panel", NAMES, ids=lambda panel: panel.title)
def test_lines_are_named_with_their_newest_value_outside_the_data(panel, figures):
    figure = draw_panel(panel, Rows(make_rows(ema=True)), "run")
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert [entry.get_text() for entry in legend.get_texts()] == NAMES[panel]
    figure.canvas.draw()
    assert legend.get_window_extent().y0 >= axis.get_window_extent().y1
    assert max(part.get_window_extent().x1 for part in (legend, figure.legends[0])) <= figure.bbox.x1
    assert draw_panel(LR, Rows(make_rows()), "run").legends == []


def test_the_axis_counts_epochs_with_their_steps(figures):
    (axis,) = draw_panel(LOSS, Rows(make_rows()), "run").axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["0\n0", "2\n80", "4\n160", "6\n240", "8\n320", "10\n400"]


@pytest.mark.parametrize(
    "panel, steep, scale", [(LOSS, True, "log"), (LOSS, False, "linear"), (ACCURACY, True, "linear")]
)
def test_only_a_loss_that_falls_far_gets_a_logarithmic_axis(panel, steep, scale, figures):
    assert draw_panel(panel, Rows(make_rows(steep=steep)), "run").axes[0].get_yscale() == scale


def test_a_spike_of_the_noise_does_not_flatten_the_curve(figures):
    made = [
        {"step": step, "kind": "train", "epoch": step / 100, "loss": 1.0 + step % 2, "lr": 0.1}
        for step in range(1, 601)
    ]
    made[300]["loss"] = 500.0
    assert draw_panel(LOSS, Rows(made), "run").axes[0].get_ylim()[1] < 60


# ------------------------------------------------------------------------------------------------------- growing files


def test_rows_are_taken_as_they_come_and_a_torn_line_when_it_is_whole(tmp_path):
    growing = GrowingRows(tmp_path / "metrics.jsonl")
    assert not growing.read() and growing.rows == []
    add_rows(tmp_path, [{"step": 1}])
    assert growing.read() and not growing.read()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step"')
        stream.flush()
        assert not growing.read() and growing.rows == [{"step": 1}]
        stream.write(": 2}\n")
    assert growing.read() and growing.rows == [{"step": 1}, {"step": 2}]
    growing.close()


def test_a_resumed_run_replaces_the_rows(tmp_path):
    log = MetricsLog(tmp_path, 0)
    growing = GrowingRows(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.add(step, "train", {"loss": 1.0})
    assert growing.read() and [row["step"] for row in growing.rows] == [1, 2, 3]
    log.close()
    log = MetricsLog(tmp_path, 1)
    log.add(2, "train", {"loss": 5.0})
    assert growing.read() and [row.get("loss") for row in growing.rows] == [1.0, 5.0]
    log.close()
    growing.close()


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match="metrics.jsonl has a line that is not JSON .*; remove that line"):
        GrowingRows(tmp_path / "metrics.jsonl").read()


@pytest.fixture
def paced(tmp_path, monkeypatch):
    """Return (a run folder, a clock, the times of drawings): a drawing takes half a second of that clock."""
    clock, drawn = {"now": 100.0}, []

    def draw(made, folder, name):
        drawn.append((clock["now"], len(made.rows)))
        clock["now"] += 0.5

    monkeypatch.setattr(utils.record.live_panels, "draw_live_plots", draw)
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

    follow(folder, GrowingRows(folder / "metrics.jsonl"), wait, until_complete=True)
    assert [count for _, count in drawn] == pytest.approx([1, 12, 22, 33, 43, 44], abs=2) and drawn[-1][1] == 44
    assert all(later - earlier >= 10.5 for (earlier, _), (later, _) in zip(drawn[:-2], drawn[1:-1]))


def test_without_new_rows_nothing_is_drawn_again(paced):
    folder, clock, drawn = paced
    add_rows(folder, make_rows())

    def wait(seconds):
        clock["now"] += 100
        return clock["now"] > 5000

    follow(folder, GrowingRows(folder / "metrics.jsonl"), wait, until_complete=False)
    assert len(drawn) == 1


def test_a_removed_folder_is_not_made_again(paced):
    folder, _, drawn = paced
    add_rows(folder, make_rows())
    (folder / "config.json").unlink()
    follow(folder, GrowingRows(folder / "metrics.jsonl"), lambda _: False, until_complete=False)
    assert drawn == [] and not (folder / "plots").exists()


# ----------------------------------------------------------------------------------------------------- from the outside


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "there is no folder RUN; name the run folder that training logs at its start"),
        (
            lambda folder: folder.mkdir(),
            "RUN is not a run folder: it has no config.json; name a folder that training made",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")),
            "RUN is not the folder of a training run: its config.json has no `loop`",
        ),
        (
            make_run,
            "RUN/metrics.jsonl has no row yet; a run writes its first after loop.log_every_steps=20 steps: try again "
            "then",
        ),
    ],
    ids=["missing", "no run", "no training", "no row"],
)
def test_what_is_no_run_is_refused_with_status_2(prepare, message, tmp_path, capsys):
    folder = tmp_path / "run"
    prepare(folder)
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err == f"live_plot: run_dir: {message.replace('RUN', str(folder))}\n"
    assert not (folder / "plots").exists()


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    make_run(folder)
    add_rows(folder, make_rows())
    monkeypatch.setattr("utils.record.live_plot.os.access", lambda path, mode: False)
    assert main([str(folder)]) == 2
    assert f"live_plot: run_dir: {folder / 'plots'} may not be written by this user" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_file_that_may_not_be_read_is_named(name, tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", make_rows())
    (folder / name).unlink()
    (folder / name).mkdir()  # root may read every file, but no folder as one
    assert main([str(folder)]) == 2
    message = "is not a run folder" if name == "config.json" else "cannot be read (Is a directory)"
    assert message in capsys.readouterr().err


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
    assert wait_for(lambda: (folder / "plots/momentum_live.png").exists())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[0].endswith("until the run is complete; Ctrl-C ends it")
    assert process.returncode == 0
    mark_complete(folder, 400)
    process = run_module(folder, stderr=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[1].splitlines()[1] == "drawn up to step 400" and process.returncode == 0


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
    assert wait_for(lambda: (folder / "plots/lr_live.png").exists())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(live._process.pid, number)
    assert os.getsid(live._process.pid) != os.getsid(0)
    own, its = (os.getpriority(os.PRIO_PROCESS, process) for process in (0, live._process.pid))
    assert its == min(19, own + 10)
    time.sleep(0.2)
    live.check()
    before = (folder / "plots/lr_live.png").read_bytes()
    add_rows(folder, make_rows()[5:])
    live.close()
    assert live._process.returncode == 0 and (folder / "plots/lr_live.png").read_bytes() != before
    assert (folder / "plots/accuracy_live.png").exists() and not live_process._pipes


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
    assert text.endswith(f"the run is not affected. `python -m utils.record.live_plot {folder}` draws the plots")


PARENT = """
import os, sys, time
from pathlib import Path
from utils.record.live_process import LivePlots
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
            assert wait_for(lambda: (folder / "plots/momentum_live.png").exists()) and len(find_drawers(folder)) == 1
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
    assert {path.name for path in (folder / "plots").glob("*_live.png")} == set(FILES)
    assert not list((tmp_path / "without/run/plots").glob("*_live.png"))
    assert rows(folder / "metrics.jsonl") == rows(tmp_path / "without/run/metrics.jsonl")
    assert not find_drawers(folder) and json.loads((folder / "complete.json").read_text()) == {"step": 4}
    assert main([str(folder)]) == 0


def test_a_killed_run_leaves_no_process_behind(images, tmp_path):
    overrides = [*TINY, f"data.root={images}", "loop.total_steps=400", *LIVE]
    started = start("finetune.py", overrides, tmp_path, kill_at_step=60)
    started.wait()
    folder = tmp_path / "run"
    assert wait_for(lambda: not find_drawers(folder)) and not (folder / "complete.json").exists()
    assert wait_for(lambda: (folder / "plots/loss_live.png").exists(), 1)
