"""Survival: whole runs that are killed, signalled, refused by the disk, fed what is not finite, and end as they should.

Equality of whole runs bit for bit, exit statuses, and messages; tests/slow_kills.py kills at random moments;
tests/tasks/troubled.py is the fine-tuning that meets the trouble. What needs no process of its own runs in the test's.
"""

import re
import signal
import time
from pathlib import Path

import pytest

import engine.run.checkpoint
from data.stream.batch import Packed
from tests.in_process import TINY, check_resumption, make_images
from tests.in_process import run as run_here
from tests.support import assert_equal_runs, common, logged, refuses, rows, run, start
from tests.tasks import troubled
from utils.io.files import read_json

TROUBLED = "tests/tasks/troubled.py"
SMALL = [
    "loop.batch_size=8", "loop.micro_batch_size=4", "loop.ema_decay=0.95", "loop.total_steps=40",
    "loop.evaluate_every_epochs=3",
]  # fmt: skip


def wait_for(started, condition, seconds=90):
    """Wait until a condition holds while the run goes on."""
    end = time.monotonic() + seconds
    while not condition():
        alive = any(process.is_alive() for process in started.processes)
        assert alive and time.monotonic() < end, f"it did not happen:\n{started.output[-3000:]}"
        time.sleep(0.01)


def has_step(run_dir, step):
    """Return a function that says whether a row of a step is written."""
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and f'{{"step": {step}, ' in path.read_text()


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(collection, folder):
    """Return the folder of the fine-tuning by SMALL that nothing has interrupted."""
    run("finetune.py", common("classification", collection, folder / "run", *SMALL), folder)
    return folder / "run"


def start_troubled(trouble, collection, run_dir, *settings):
    """Start the fine-tuning by SMALL in a trouble; returns the processes and the overrides."""
    overrides = common("classification", collection, run_dir, *SMALL, *settings)
    return start(TROUBLED, overrides, run_dir.parent, variables={"TROUBLE": trouble}), overrides


# --- kills


def test_a_kill_inside_a_save_leaves_the_checkpoint_before_it(collection, straight, tmp_path):
    killed = tmp_path / "killed"
    started, overrides = start_troubled("slow_save 0.1", collection, killed, "loop.checkpoint_every_steps=10")
    wait_for(
        started,
        lambda: (
            list((killed / "checkpoints").glob(".step_00000020.*")) and (killed / "checkpoints/step_00000010").exists()
        ),
    )
    started.signal(signal.SIGKILL)
    assert started.wait() == [-9]
    half, whole = checkpoints(killed)
    assert re.fullmatch(r"\.step_00000020\.tmp-\d+", half) and whole == "step_00000010"
    assert "at step 10" in run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, killed, 40)
    assert not list((killed / "checkpoints").glob(".*"))


# --- signals


def test_a_signal_to_all_processes_of_a_rank_saves_and_leaves(collection, straight, tmp_path):
    """A scheduler signals the loader's workers too: they go on until their rank has saved."""
    stopped = tmp_path / "stopped"
    overrides = common("classification", collection, stopped, *SMALL, "runtime.workers=2")
    started = start("finetune.py", overrides, tmp_path)
    wait_for(started, has_step(stopped, 5))
    started.signal(signal.SIGINT)
    assert started.wait() == [75]
    assert started.output.count("SIGINT: finishing the step, then saving") == 1
    assert f"saved in {stopped}; the same command continues" in started.output and "Traceback" not in started.output
    step = rows(stopped / "metrics.jsonl")[-1]["step"]
    assert checkpoints(stopped)[-1] == f"step_{step:08d}" and step < 40
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, stopped, 40)


def test_a_checkpoint_is_due_by_time_too_and_changes_no_result(tmp_path):
    """A run of slow steps never reaches loop.checkpoint_every_steps."""
    make_images(tmp_path / "images")
    settings = [*TINY, "data.root=images", "loop.total_steps=6", "loop.checkpoint_every_steps=1000"]
    run_here("finetune", [*settings, "run_dir=plain"], tmp_path)
    run_here("finetune", [*settings, "run_dir=timed", "loop.checkpoint_every_minutes=1e-6"], tmp_path)
    saved = [
        (tmp_path / name / "log.txt").read_text().count(f"saving {name}/checkpoints/") for name in ("plain", "timed")
    ]
    assert saved == [1, 6]
    assert_equal_runs(tmp_path / "plain", tmp_path / "timed", 6)


# --- the disk


# An update of this takes milliseconds, and troubled.py's own batch is of 8, too.
HERE = [*TINY, "optim.lr=0.005", "loop.batch_size=8", "loop.total_steps=20", "loop.checkpoint_every_steps=5"]


@pytest.fixture
def trouble(monkeypatch):
    """Return a function that gets this process into a trouble until the test ends."""
    for target in troubled.PATCHED:
        monkeypatch.setattr(*target, getattr(*target))
    return lambda text: troubled.start(*text.split())


@pytest.mark.parametrize("steps, ends", [("10 15", False), ("15 20", True)])
def test_a_refused_checkpoint_is_tried_again_but_the_last_one_is_an_error(steps, ends, collection, trouble, tmp_path):
    settings = [*HERE, f"data.root={collection}", "run_dir=run"]
    trouble(f"full_disk {steps}")
    if ends:
        with refuses(r"^run_dir: run/checkpoints/step_00000020 cannot be written"):
            run_here("finetune", settings, tmp_path)
    else:
        run_here("finetune", settings, tmp_path)
    assert (tmp_path / "run/log.txt").read_text().count("The next save tries again") == (1 if ends else 2)
    assert checkpoints(tmp_path / "run") == ["step_00000005", "step_00000010" if ends else "step_00000020"]


def test_best_weights_that_are_refused_are_written_at_the_next_step(tmp_path, monkeypatch):
    original, calls = engine.run.checkpoint.write_weights, []

    def refuse_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(engine.run.checkpoint, "write_weights", refuse_first)
    make_images(tmp_path / "images")
    overrides = [*TINY, "data.root=images", "run_dir=run", "loop.evaluate_every_epochs=0.5", "task=classification"]
    run_here("finetune", overrides, tmp_path)
    states = [read_json(path / "state.json") for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert [state["best"]["step"] for state in states] == [None, 2]


def test_a_disk_that_is_full_for_a_while(small_disk, collection, straight, tmp_path):
    """Everything in the run folder meets the full disk: rows, log, curves, tables, weights, checkpoints."""
    full, filler = small_disk / "run", small_disk / "filler"
    overrides = common("classification", collection, full, *SMALL, "loop.checkpoint_every_steps=3")
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "slow_evaluation 0.1"})
    wait_for(started, lambda: list((full / "checkpoints").glob("step_*")) if full.exists() else False)
    with open(filler, "wb", buffering=0) as stream:  # to the last byte
        while True:
            try:
                stream.write(bytes(4096))
            except OSError:
                break
    wait_for(started, lambda: "The next save tries again" in started.output)
    filler.unlink()
    assert started.wait() == [0]
    assert "Traceback" not in started.output
    assert_equal_runs(straight, full, 40)


# --- processes


def test_a_killed_worker_is_named_with_what_to_do(collection, straight, tmp_path):
    killed, settings = tmp_path / "killed", ["loop.checkpoint_every_steps=10", "runtime.workers=2"]
    started, overrides = start_troubled(f"kill_worker 17 {tmp_path}/marker", collection, killed, *settings)
    assert started.wait() == [70], started.output[-3000:]
    assert re.search(
        r"finetune\.py: runtime\.workers: loader worker \d+ of this rank has ended .* set a lower runtime\.workers",
        started.output,
    )
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, killed, 40)


# --- what is not finite


BAD = [*HERE, "loop.log_every_steps=5", "run_dir=bad"]


def test_skipped_steps_are_counted_and_listed_with_their_samples(collection, trouble, tmp_path):
    """A kill between changes nothing: the first checkpoint is of step 8, and what is skipped is read at step 20."""
    trouble("nan 7 8")
    settings = [*BAD, f"data.root={collection}"]
    run_here("finetune", settings, tmp_path)
    said = (tmp_path / "bad/log.txt").read_text()
    assert "2 steps were skipped before step 10" in said
    assert re.search(r"step 7 was skipped: its loss was not finite on rank 0; samples: train/\w/\d+\.png, ", said)
    listed = rows(tmp_path / "bad/skipped_steps.jsonl")
    assert [(row["step"], row["ranks"], row["what"], len(row["paths"])) for row in listed] == [
        (7, [0], "loss", 8), (8, [0], "loss", 8),
    ]  # fmt: skip
    assert logged(tmp_path / "bad", "train", "skipped_steps") == [0.0, 2.0, 0.0, 0.0]

    settings += ["loop.checkpoint_every_steps=8", "loop.log_every_steps=20"]
    check_resumption("finetune", settings, tmp_path, killed_at=12, steps=20)
    assert rows(tmp_path / "straight/skipped_steps.jsonl") == rows(tmp_path / "killed/skipped_steps.jsonl") == listed


def test_too_many_skipped_steps_end_the_run(collection, trouble, tmp_path, monkeypatch):
    trouble("nan 7 12")
    monkeypatch.setattr("engine.run.skips.MOST_SKIPPED", 3)
    with refuses(r"^optim.lr: 4 of the last 100 steps before step 10 .* first step 7;"):
        run_here("finetune", [*BAD, f"data.root={collection}"], tmp_path)
    assert checkpoints(tmp_path / "bad") == ["step_00000005"]


def test_a_run_keeps_no_batch(tmp_path, monkeypatch):
    """As much shared memory is mapped after 30 steps as after 3."""
    make_images(tmp_path / "images")
    mapped = []
    unpack = Packed.unpack

    def count(batch):
        mapped.append(Path("/proc/self/maps").read_text().count("/torch_"))
        return unpack(batch)

    monkeypatch.setattr(Packed, "unpack", count)
    workers = ["runtime.workers=1", "loop.total_steps=30", "loop.log_every_steps=30", "loop.checkpoint_every_steps=30"]
    run_here("finetune", [*TINY, "data.root=images", "run_dir=run", *workers], tmp_path)
    assert len(mapped) >= 60 and max(mapped) < 2 * max(mapped[:6])
