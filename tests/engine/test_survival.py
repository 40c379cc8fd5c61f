"""Survival: whole runs that are killed, signalled, refused by the disk, fed what is not finite, and end as they should.

Equality of whole runs bit for bit, exit statuses, and messages. The long form, fifty kills, is bench/kill_trials.py;
tests/tasks/troubled.py is the fine-tuning that meets the trouble.
"""

import pydoc
import random
import re
import signal
import subprocess
import time

import pytest
import torch

from tests.engine.test_exactness import assert_same_tensors
from tests.in_process import TINY, make_images
from tests.in_process import run as run_here
from tests.support import (
    ROOT,
    SCRIPTS,
    checkpoint_tensors,
    command,
    common,
    make_collection,
    rows,
    run,
    slow_but,
    start,
)
from utils.errors import UserError
from utils.io.files import read_json
from utils.ranks.signals import REPEAT_SEC

TROUBLED = "tests/tasks/troubled.py"
SMALL = ["loop.global_batch_size=8", "loop.batch_size=4", "loop.ema_decay=0.95"]


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


@pytest.fixture
def uninterrupted(collection, tmp_path):
    """Return a function that makes the uninterrupted run of some settings and returns its folder."""

    def make(*settings, task="classification"):
        run(SCRIPTS[task], common(task, collection, tmp_path / "uninterrupted", *settings), tmp_path)
        return tmp_path / "uninterrupted"

    return make


def assert_equal_runs(one, other, steps):
    assert_same_tensors(checkpoint_tensors(one, steps), checkpoint_tensors(other, steps))
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")


# --- kills


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "fcmae"])
def test_eight_kills_leave_no_trace(task, collection, uninterrupted, tmp_path):
    settings = [
        *SMALL, "loop.total_steps=70", "loop.checkpoint_every_steps=4", "runtime.workers=2",
        "model.drop_path_rate=0.2",
    ]  # fmt: skip
    straight, killed = uninterrupted(*settings, task=task), tmp_path / "killed"
    draw, step = random.Random(0), 0
    for _ in range(8):
        step += draw.randint(3, 8)
        run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path, expect=-9, kill_at_step=step)
    run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path)
    assert_equal_runs(straight, killed, 70)


@pytest.mark.parametrize("background", slow_but(["true"], ["true", "false"]))
def test_a_kill_inside_a_save_leaves_the_checkpoint_before_it(background, collection, uninterrupted, tmp_path):
    settings = [
        *SMALL, "loop.total_steps=12", "loop.checkpoint_every_steps=4", f"loop.save_in_background={background}",
    ]  # fmt: skip
    straight, killed = uninterrupted(*settings), tmp_path / "killed"
    overrides = common("classification", collection, killed, *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "slow_save 0.5"})
    wait_for(started, lambda: (killed / "checkpoints/step_00000004").exists() and "saving slowly" in
             started.output.partition("saved ")[2])  # fmt: skip
    started.signal(signal.SIGKILL)
    assert started.wait() == [-9]
    half, whole = checkpoints(killed)
    assert re.fullmatch(r"\.step_00000008\.tmp-\d+", half) and whole == "step_00000004"
    assert "at step 4" in run(SCRIPTS["classification"], overrides, tmp_path)
    assert_equal_runs(straight, killed, 12)
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_exactness.py does the same on a CPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["classification", "fcmae"])
def test_on_a_gpu_killed_and_resumed_equals_uninterrupted_bit_for_bit(task, precision, collection, tmp_path):
    """With runtime.deterministic=true, which runtime=reference sets."""
    settings = [
        *SMALL, "loop.total_steps=20", "loop.checkpoint_every_steps=4", "loop.clip_grad_norm=1.0", "runtime.workers=2",
        "runtime.device=cuda", f"runtime.precision={precision}", "runtime.deterministic=true",
        "model.drop_path_rate=0.3",
    ]  # fmt: skip
    straight, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run(SCRIPTS[task], common(task, collection, straight, *settings), tmp_path)
    run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path, expect=-9, kill_at_step=10)
    run(SCRIPTS[task], common(task, collection, killed, *settings), tmp_path)
    assert_equal_runs(straight, killed, 20)


# --- signals


STOPPED = [*SMALL, "loop.total_steps=40", "loop.checkpoint_every_steps=10", "loop.evaluate_every_epochs=3"]


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]))
def test_a_signal_to_all_processes_of_a_rank_saves_and_leaves(number, collection, uninterrupted, tmp_path):
    """A scheduler signals the loader's workers too: they go on until their rank has saved."""
    settings = [*STOPPED, "loop.total_steps=60", "runtime.workers=2"]
    straight, stopped = uninterrupted(*settings), tmp_path / "stopped"
    overrides = common("classification", collection, stopped, *settings)
    started = start("finetune.py", overrides, tmp_path)
    wait_for(started, has_step(stopped, 5))
    started.signal(number)
    assert started.wait() == [75]
    assert started.output.count(f"{number.name}: finishing the step, then saving") == 1
    step = rows(stopped / "metrics.jsonl")[-1]["step"]
    assert checkpoints(stopped)[-1] == f"step_{step:08d}" and step < 60
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, stopped, 60)


@pytest.mark.parametrize("trouble", slow_but(["slow_save 0.3"], ["slow_evaluation 0.3", "slow_save 0.3"]))
def test_a_signal_within_an_evaluation_or_a_save_waits_for_it(trouble, collection, uninterrupted, tmp_path):
    straight, stopped = uninterrupted(*STOPPED), tmp_path / "stopped"
    overrides = common("classification", collection, stopped, *STOPPED)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": trouble})
    wait_for(started, lambda: "ing slowly" in started.output)
    started.signal(signal.SIGTERM)
    assert started.wait() == [75]
    assert not list((stopped / "checkpoints").glob(".*"))
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, stopped, 40)


@pytest.mark.parametrize("trouble", ["slow_evaluation 30", "slow_save 30"])
def test_a_second_signal_leaves_at_once(trouble, collection, tmp_path):
    started = start(
        TROUBLED, common("classification", collection, tmp_path / "run", *STOPPED), tmp_path,
        variables={"TROUBLE": trouble},
    )  # fmt: skip
    wait_for(started, lambda: "ing slowly" in started.output)
    started.signal(signal.SIGUSR1)
    wait_for(started, lambda: "finishing the step" in started.output)
    time.sleep(REPEAT_SEC)  # before, it would be taken for the same request
    before = checkpoints(tmp_path / "run")
    started.signal(signal.SIGTERM)
    assert started.wait(timeout=20) == [75]  # the trouble takes longer
    assert "SIGTERM again: leaving at once, without saving" in started.output
    assert checkpoints(tmp_path / "run") == before


# --- the disk


def test_a_refused_checkpoint_ends_the_run_and_the_one_before_it_stays(collection, uninterrupted, tmp_path):
    settings = [*SMALL, "loop.total_steps=20", "loop.checkpoint_every_steps=4"]
    straight, refused = uninterrupted(*settings), tmp_path / "refused"
    overrides = common("classification", collection, refused, *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "full_disk 8 99"})
    assert started.wait() == [2]
    said = re.search(
        r"finetune\.py: run_dir: the checkpoint of step 8 cannot be written to (\S+)/checkpoints: it needs "
        r"(\d+\.\d) MiB, "
        r"\d+\.\d MiB are free \(.*No space left on device\)",
        started.output,
    )
    assert said.group(1) == str(refused) and float(said.group(2)) > 0
    assert "Traceback" not in started.output
    assert checkpoints(refused) == ["step_00000004"]
    assert rows(refused / "metrics.jsonl")[-1]["step"] < 20, "it was found at the last save only"
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, refused, 20)


@pytest.mark.slow
def test_on_failed_save_retry_continues_and_saves_when_it_can(collection, uninterrupted, tmp_path):
    settings = [*SMALL, "loop.total_steps=20", "loop.checkpoint_every_steps=4", "loop.on_failed_save=retry"]
    straight, retried = uninterrupted(*settings), tmp_path / "retried"
    overrides = common("classification", collection, retried, *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "full_disk 8 12"})
    assert started.wait() == [0]
    assert started.output.count("The run continues and tries again at its next save (loop.on_failed_save=retry)") == 2
    assert checkpoints(retried) == ["step_00000016", "step_00000020"]
    assert_equal_runs(straight, retried, 20)


def test_the_last_save_is_an_error(collection, tmp_path):
    settings = [*SMALL, "loop.total_steps=8", "loop.checkpoint_every_steps=4", "loop.on_failed_save=retry"]
    overrides = common("classification", collection, tmp_path / "run", *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "full_disk 8 8"})
    assert started.wait() == [2] and "the checkpoint of step 8 cannot be written" in started.output
    assert checkpoints(tmp_path / "run") == ["step_00000004"]


OTHER_WRITES = {
    "engine.saver.write_weights": "the best weights of step 1",
    "engine.recorder.Recorder.sync_samples": "the record of samples",
}


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("write", OTHER_WRITES)
def test_a_refused_file_beside_the_checkpoints_is_an_error_or_written_at_the_next_step(
    write, retry, tmp_path, monkeypatch, capsys
):
    """The first write of it is refused: with retry, best weights and the first checkpoint are of step 2."""
    original, calls = pydoc.locate(write), []

    def refuse_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(write, refuse_first)
    make_images(tmp_path / "images")
    overrides = [*TINY, "data.root=images", "run_dir=run", "loop.evaluate_every_epochs=0.5", "task=classification"]
    refused = f"run_dir: {OTHER_WRITES[write]} cannot be written to "
    if not retry:
        with pytest.raises(UserError, match=f"^{refused}.*No space left on device"):
            run_here("finetune", overrides, tmp_path)
        assert len(calls) == 1 and checkpoints(tmp_path / "run") == []
        return
    run_here("finetune", [*overrides, "loop.on_failed_save=retry"], tmp_path)
    assert refused in capsys.readouterr().err
    if write == "engine.saver.write_weights":
        first, second = (
            read_json(tmp_path / f"run/checkpoints/step_0000000{step}/state.json")["best"]["step"] for step in (1, 2)
        )
        assert (first, second) == (None, 2)
    else:
        assert checkpoints(tmp_path / "run") == ["step_00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of its own, of 1 MiB; unmounted at the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()}); the tests above raise its error")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("retry", slow_but([False], [False, True]))
def test_a_disk_that_is_full(retry, small_disk, collection, uninterrupted, tmp_path):
    """Everything in the run folder meets the full disk: rows, log, curves, tables, weights, checkpoints."""
    settings = [*SMALL, "loop.total_steps=60", "loop.checkpoint_every_steps=3", "loop.evaluate_every_epochs=1"]
    settings += ["loop.on_failed_save=retry"] if retry else []
    straight, full = uninterrupted(*settings), small_disk / "run"
    overrides = common("classification", collection, full, *settings)
    filler = small_disk / "filler"
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": "slow_evaluation 0.1"})
    wait_for(started, lambda: list((full / "checkpoints").glob("step_*")) if full.exists() else False)
    with open(filler, "wb", buffering=0) as stream:  # to the last byte
        while True:
            try:
                stream.write(bytes(4096))
            except OSError:
                break
    if retry:
        wait_for(started, lambda: "tries again at its next save" in started.output)
        filler.unlink()
        assert started.wait() == [0]
    else:
        assert started.wait() == [2]
        assert re.search(r"the .* of step \d+ cannot be written .* MiB, .*No space left on device", started.output)
        assert [name for name in checkpoints(full) if name.startswith("step_")]
        filler.unlink()
        run("finetune.py", overrides, tmp_path)
    assert "Traceback" not in started.output
    assert_equal_runs(straight, full, 60)


def test_a_disk_that_becomes_read_only(small_disk, collection, tmp_path):
    settings = [*SMALL, "loop.total_steps=100000", "loop.checkpoint_every_steps=3", "loop.evaluate_every_epochs=1000"]
    overrides = common("classification", collection, small_disk / "run", *settings)
    started = start("finetune.py", overrides, tmp_path)
    wait_for(started, lambda: list(small_disk.glob("run/checkpoints/step_*")))
    # A mount with files open for writing refuses to become read-only; an immutable folder is as good.
    frozen = subprocess.run(["chattr", "+i", str(small_disk / "run/checkpoints")], capture_output=True, text=True)
    if frozen.returncode != 0:
        started.signal(signal.SIGKILL)
        started.wait()
        pytest.skip(f"folders cannot be frozen here ({frozen.stderr.strip()})")
    try:
        assert started.wait() == [2]
    finally:
        subprocess.run(["chattr", "-i", str(small_disk / "run/checkpoints")], check=True)
    assert re.search(r"run_dir: the checkpoint of step \d+ cannot be written .* it needs ", started.output)
    assert [name for name in checkpoints(small_disk / "run") if name.startswith("step_")]


# --- processes


@pytest.mark.ddp
def test_a_killed_worker_is_named_with_what_to_do(collection, uninterrupted, tmp_path):
    settings = [*SMALL, "loop.total_steps=16", "loop.checkpoint_every_steps=4", "runtime.workers=2"]
    straight, killed = uninterrupted(*settings), tmp_path / "killed"
    overrides = common("classification", collection, killed, *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": f"kill_worker 7 {tmp_path}/marker"})
    assert started.wait() == [70]
    assert re.search(
        r"finetune\.py: runtime\.workers: loader worker \d+ of this rank has ended \((is killed by signal: Killed|"
        r"exited unexpectedly)\)\. Most often the machine ran out of memory .* set a lower runtime\.workers",
        started.output,
    )
    run("finetune.py", overrides, tmp_path)
    assert_equal_runs(straight, killed, 16)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("trouble", ["kill_rank 0 14", "kill_worker 14"])
def test_torchrun_restarts_what_was_killed(trouble, collection, tmp_path):
    """Of rank 0 alone, so that its workers are orphans: they must not hold the run folder."""
    settings = [*SMALL, "loop.total_steps=16", "loop.checkpoint_every_steps=4", "runtime.workers=1",
                "runtime.hang_timeout_sec=16"]  # fmt: skip
    straight, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run("finetune.py", common("classification", collection, straight, *settings), tmp_path, ranks=2)
    done = command(
        "torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=2", ROOT / TROUBLED,
        *common("classification", collection, killed, *settings), TROUBLE=f"{trouble} {tmp_path}/marker",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "marker").exists() and "resumed from" in done.stderr
    assert_equal_runs(straight, killed, 16)


# --- what is not finite


BAD = [*SMALL, "loop.total_steps=20", "loop.checkpoint_every_steps=5", "loop.log_every_steps=5"]


def poison(amounts):
    return {"TROUBLE": f"nan {amounts}"}


def test_skipped_steps_are_counted_and_listed_with_their_samples(collection, tmp_path):
    bad = tmp_path / "bad"
    overrides = common("classification", collection, bad, *BAD)
    started = start(TROUBLED, overrides, tmp_path, variables=poison("7 8"))
    assert started.wait() == [0]
    assert "2 steps were skipped before step 10" in started.output
    assert re.search(
        r"step 7 was skipped: its loss was not finite on rank 0; samples: train/\w/\d+\.png, ", started.output
    )
    listed = rows(bad / "skipped_steps.jsonl")
    assert [(row["step"], row["ranks"], row["what"], len(row["paths"])) for row in listed] == [
        (7, [0], "loss", 8), (8, [0], "loss", 8),
    ]  # fmt: skip
    assert [row["skipped_steps"] for row in rows(bad / "metrics.jsonl", "train")] == [0.0, 2.0, 0.0, 0.0]


def test_a_kill_between_changes_nothing_about_what_is_listed(collection, tmp_path):
    """Steps 7 and 8 are skipped, the checkpoint is of step 8, the log of step 20."""
    settings = [*BAD[:3], "loop.total_steps=20", "loop.checkpoint_every_steps=8", "loop.log_every_steps=20"]
    for name in ("straight", "killed"):
        overrides = common("classification", collection, tmp_path / name, *settings)
        started = start(TROUBLED, overrides, tmp_path, kill_at_step=12 if name == "killed" else None,
                        variables=poison("7 8"))  # fmt: skip
        assert started.wait() == [-9 if name == "killed" else 0]
    assert start(TROUBLED, overrides, tmp_path, variables=poison("7 8")).wait() == [0]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert rows(straight / "skipped_steps.jsonl") == rows(killed / "skipped_steps.jsonl")
    assert_equal_runs(straight, killed, 20)


def test_too_many_stop_the_run_with_step_and_rank(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "bad", *BAD, "loop.max_skipped_steps=3")
    started = start(TROUBLED, overrides, tmp_path, variables=poison("7 12"))
    assert started.wait() == [2]
    assert (
        "loop.max_skipped_steps: 4 of the last 10 steps before step 10 were not finite (losses on rank 0), first step "
        "7; 3 are allowed" in started.output
    )
    assert "Traceback" not in started.output and checkpoints(tmp_path / "bad") == ["step_00000005"]


@pytest.mark.slow
@pytest.mark.ddp
def test_the_rank_that_is_not_finite_is_named(collection, tmp_path, monkeypatch):
    monkeypatch.setenv("TROUBLE", "nan 7 12 1")
    overrides = common("classification", collection, tmp_path / "bad", *BAD, "loop.max_skipped_steps=3")
    done = command("torchrun", "--standalone", "--nproc_per_node=2", ROOT / TROUBLED, *overrides, OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert "step 7 was skipped: its loss was not finite on rank 1; samples: train/" in done.stderr
    assert "were not finite (losses on rank 1), first step 7" in done.stderr


# --- images that go away


def test_a_run_that_loses_its_images_stops_training_and_ends(tmp_path):
    """Before step 12, with one rank's loader in line: steps 13 on weigh nothing, and step 25 is the next log after ten
    of them. The images come back, and the same command goes on.
    """
    data, lost = make_collection(tmp_path / "images"), tmp_path / "lost"
    settings = [*BAD, "loop.total_steps=40"]
    overrides = common("classification", data, lost, *settings)
    started = start(TROUBLED, overrides, tmp_path, variables={"TROUBLE": f"lose_images 12 {data}/train"})
    assert started.wait() == [2]
    assert "data.root: no image of steps 16 to 25 could be read, see the warnings above" in started.output
    assert "Traceback" not in started.output
    assert "step 13 was skipped: none of its images could be read, or all have weight 0; samples: train/" in (
        started.output
    )
    train = rows(lost / "metrics.jsonl", "train")
    assert [row["skipped_steps"] for row in train] == [0.0, 0.0, 3.0, 5.0, 5.0] and train[-1]["loss"] is None
    listed = rows(lost / "skipped_steps.jsonl")
    assert [row["step"] for row in listed] == list(range(13, 26)) and {row["what"] for row in listed} == {"weight"}
    assert checkpoints(lost) == ["step_00000015", "step_00000020"]
    assert_same_tensors(checkpoint_tensors(lost, 15), checkpoint_tensors(lost, 20))

    (data / "train.lost").rename(data / "train")
    assert "at step 20" in run("finetune.py", overrides, tmp_path)
    assert [row["skipped_steps"] for row in rows(lost / "metrics.jsonl", "train")] == [0.0, 0.0, 3.0, 5.0, *[0.0] * 4]


def test_a_short_run_of_which_nothing_can_be_read_ends_too(tmp_path):
    data = make_collection(tmp_path / "images")
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    overrides = common("classification", data, tmp_path / "run", *SMALL, "loop.total_steps=4")
    printed = run("finetune.py", overrides, tmp_path, expect=2)
    refused = "data.root: no image of steps 1 to 4 could be read, see the warnings above and unreadable.jsonl"
    assert refused in printed and "Traceback" not in printed
    assert len((tmp_path / "run/unreadable.jsonl").read_text().splitlines()) >= 4 * 8
    assert not checkpoints(tmp_path / "run")


# --- a second run


def test_two_runs_on_one_folder_the_second_is_refused(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "run", *SMALL, "loop.total_steps=100000")
    started = start("finetune.py", overrides, tmp_path)
    wait_for(started, has_step(tmp_path / "run", 2))
    printed = run("finetune.py", overrides, tmp_path, expect=2)
    assert f"run_dir: another run is writing to {tmp_path}/run; wait for it or give another run_dir" in printed
    started.signal(signal.SIGKILL)
    started.wait()
