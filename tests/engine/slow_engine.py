"""The slow forms of this folder's tests: other tasks, ranks, settings and signals."""

import pytest
import torch

from tests.engine import test_exactness as exactness
from tests.engine import test_golden as golden
from tests.engine.test_exactness import CHEAP, TASKS
from tests.engine.test_survival import HERE, SMALL, TROUBLED, straight  # noqa: F401 (a fixture)
from tests.support import (
    ROOT,
    SCRIPTS,
    assert_equal_runs,
    assert_same_rows,
    assert_same_tensors,
    checkpoint_tensors,
    command,
    common,
    logged,
    make_collection,
    rows,
    run,
    samples_by_step,
    start,
)
from utils.hardware import missing_for_compile
from utils.io.files import read_json

FAST = ["runtime.compile=true", "runtime.channels_last=true", "runtime.precision=bf16", "runtime.deterministic=false"]

# --- the quick tests of other tasks, optimisers and signals


@pytest.mark.parametrize("task", [task for task in TASKS if task not in CHEAP])
def test_losses_of_twenty_steps(task, collection, tmp_path, request):
    golden.test_losses_of_twenty_steps(task, collection, tmp_path, request)


def test_killed_and_resumed(collection, tmp_path):
    exactness.test_killed_and_resumed_equals_uninterrupted_bit_for_bit(collection, tmp_path, "multicrop")


def test_two_ranks_equal_one(collection, tmp_path):
    more = ["optim.lr=1e-5"]
    exactness.test_two_ranks_equal_one_at_the_same_global_batch(collection, tmp_path, "autoencoder", more)


# --- what takes long in any form


def test_a_step_that_is_not_finite_on_one_rank_changes_no_rank(collection, tmp_path):
    """Of a gradient or without weight: tests/engine/test_step.py."""
    settings = ["loop.batch_size=8", "loop.ema_decay=0.9", "loop.clip_grad_norm=1.0"]
    path, states = tmp_path / "run", []
    for steps in (2, 3, 5):
        overrides = common("classification", collection, path, *settings, f"loop.total_steps={steps}")
        run(TROUBLED, overrides, tmp_path, ranks=2, variables={"TROUBLE": "nan 3 3 1"})
        states.append(checkpoint_tensors(path, steps))
    assert_same_tensors(*states[:2])
    assert any(not torch.equal(states[2][name], tensor) for name, tensor in states[1].items())
    assert logged(path, "train", "skipped_steps") == [0, 0, 1, 0, 0]
    (listed,) = rows(path / "skipped_steps.jsonl")
    assert (listed["what"], listed["ranks"]) == ("loss", [1])


RANKS = [2, 3, 1]


@pytest.mark.parametrize("case", ["fcmae", "classification optim=adan"])
def test_a_checkpoint_resumes_on_any_number_of_ranks(case, collection, tmp_path):
    """Six steps on each number of ranks, killed after all but the last, against a run on one rank."""
    task, *settings = case.split()
    total, there, here = 6 * len(RANKS), tmp_path / "moved", tmp_path / "one"
    settings = [
        f"loop.total_steps={total}", "loop.batch_size=12", "loop.checkpoint_every_steps=6", "optim.lr=0.001",
        "loop.ema_decay=0.9", "loop.clip_grad_norm=0.5", *settings,
    ]  # fmt: skip
    for done, ranks in zip(range(0, total, 6), RANKS):
        overrides = common(task, collection, there, *settings, "loop.micro_batch_size=3")
        end = {"expect": -9, "kill_at_step": done + 6} if done + 6 < total else {}
        said = run(SCRIPTS[task], overrides, tmp_path, ranks=ranks, **end)
        assert done == 0 or f"at step {done}" in said
    run(SCRIPTS[task], common(task, collection, here, *settings), tmp_path)
    assert_same_tensors(checkpoint_tensors(there, total), checkpoint_tensors(here, total), tolerance=2e-5)
    assert samples_by_step(there) == samples_by_step(here)
    losses = [logged(path, "train", "loss") for path in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == total


def test_torchrun_restarts_what_was_killed(collection, tmp_path):
    """Of rank 0 alone, so that its workers are orphans: they must not hold the run folder."""
    settings = [*SMALL, "loop.total_steps=16", "loop.checkpoint_every_steps=4", "runtime.workers=1",
                "runtime.hang_timeout_sec=16"]  # fmt: skip
    whole, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run("finetune.py", common("classification", collection, whole, *settings), tmp_path, ranks=2)
    done = command(
        "torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=2", ROOT / TROUBLED,
        *common("classification", collection, killed, *settings), TROUBLE=f"kill_rank 0 14 {tmp_path}/marker",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "marker").exists() and "resumed from" in done.stderr
    assert_equal_runs(whole, killed, 16)


def test_the_same_figures_on_any_number_of_ranks_and_from_evaluate(tmp_path):
    """Sets that no number of ranks divides, one image of them unreadable."""
    data = make_collection(tmp_path / "images", per_class=17, validation=7, broken=1)
    settings = ["loop.total_steps=1", "loop.batch_size=12", "loop.micro_batch_size=4", "optim.lr=0", "task.probe.k=4"]
    settings.append("schedule.warmup_steps=1")
    found = []
    for ranks in (1, 2, 3):
        run("pretrain_fcmae.py", common("fcmae", data, tmp_path / f"{ranks}", *settings), tmp_path, ranks=ranks)
        (row,) = rows(tmp_path / f"{ranks}/metrics.jsonl", "evaluate")
        found.append((row["probe/knn"], row["probe/linear"]))
        assert_same_rows(tmp_path / "1", tmp_path / f"{ranks}")
    assert found[0][0] > 1 / 3  # shapes differ in random features too
    assert found[1] == found[0] and found[2] == found[0]
    for ranks in (1, 2):
        arguments = ["weights=last", "runtime.precision=fp32", "runtime.threads=1", "batch_size=5"]
        run("evaluate.py", [f"run_dir={tmp_path}/1", *arguments], tmp_path, ranks=ranks)
        metrics = read_json(tmp_path / "1/metrics_last.json")
        assert (metrics["probe/knn"], metrics["probe/linear"]) == found[0]


def test_one_head_on_any_number_of_ranks(tmp_path):
    data, losses = make_collection(tmp_path / "images", per_class=8), []
    for ranks in (1, 2):
        folder = tmp_path / f"run{ranks}"
        words = ["task.head=fitted", "loop.total_steps=1", "schedule.warmup_steps=1"]
        run("finetune.py", common("classification", data, folder, *words), tmp_path, ranks=ranks)
        losses.append(logged(folder, "train", "loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.skipif(missing_for_compile("cpu"), reason="needs a C++ compiler and Python's headers")
def test_a_compiled_run_of_two_ranks_leaves_the_files_of_an_eager_one(collection, tmp_path, task="fcmae"):
    settings = ["loop.total_steps=4", "loop.batch_size=8", "loop.ema_decay=0.9", "loop.checkpoint_every_steps=4"]
    compiled = common(task, collection, tmp_path / "compiled", *settings, *FAST)
    started = start(SCRIPTS[task], compiled, tmp_path, ranks=2)
    assert started.wait(500) == [0, 0], started.output[-3000:]
    assert "compiling the task" in started.output
    run(SCRIPTS[task], common(task, collection, tmp_path / "eager", *settings), tmp_path)
    losses = [logged(tmp_path / way, "train", "loss") for way in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

    found, expected = (checkpoint_tensors(tmp_path / name, 4) for name in ("compiled", "eager"))
    assert found.keys() == expected.keys()
    assert all(
        found[name].shape == tensor.shape and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    # An eager float32 rank goes on from it.
    more = [text for text in compiled if text not in FAST and not text.startswith("loop.total_steps")]
    allowed = ["loop.total_steps=6", "resume_allow=[runtime.precision,runtime.deterministic]"]
    assert "at step 4" in run(SCRIPTS[task], [*more, *allowed], tmp_path)
