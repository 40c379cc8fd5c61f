"""Sharded training (runtime.parallel=fsdp). Equality of whole runs, as real processes, with one rank and with ddp to
summation order; resume bit for bit; checkpoints of either resume in the other on any number of ranks; refusals.
"""

import pytest
import torch
from torch import nn

from engine.parallel import _keep_whole, find_units
from engine.runtime import Runtime, missing_for_compile
from engine.task import Task
from tests.engine.test_exactness import CHEAP, NOISY, assert_same_tensors
from tests.in_process import SMALL_MODEL
from tests.in_process import run as run_here
from tests.support import (
    SCRIPTS,
    assert_same_rows,
    checkpoint_tensors,
    common,
    rows,
    run,
    samples_by_step,
    slow_but,
    start,
)
from utils.errors import UserError

FSDP = "runtime.parallel=fsdp"
OTHERS = [
    "classification optim=adan",
    "classification optim=sgd",
    "classification optim.layer_decay=0.7",
    "fcmae task.execution=dense",
    "fcmae runtime.grad_checkpointing=true",
]


@pytest.mark.ddp
@pytest.mark.parametrize("case", slow_but(["fcmae"], [*sorted(SCRIPTS), *OTHERS]))
def test_sharded_equals_replicated_equals_one_rank(case, collection, tmp_path):
    """The same weights, optimiser state, average, losses and evaluations."""
    task, *settings = case.split()
    settings = [
        "loop.total_steps=12", "loop.global_batch_size=16", "loop.checkpoint_every_steps=12", "optim.lr=0.001",
        "loop.ema_decay=0.9", "loop.clip_grad_norm=0.01", "loop.evaluate_every_epochs=2", *settings,
    ]  # fmt: skip
    variants = {"one": (1, 16, []), "ddp": (2, 4, []), "fsdp": (2, 4, [FSDP])}  # two ranks take two micro-batches each
    for name, (ranks, cap, more) in variants.items():
        overrides = common(task, collection, tmp_path / name, *settings, f"loop.batch_size={cap}", *more)
        printed = run(SCRIPTS[task], overrides, tmp_path, ranks=ranks)
        assert ("MiB of parameters on this rank" in printed) is (name == "fsdp")
    sharded = checkpoint_tensors(tmp_path / "fsdp", 12)
    for name in ("one", "ddp"):
        assert_same_tensors(checkpoint_tensors(tmp_path / name, 12), sharded, tolerance=2e-5)
        assert_same_rows(tmp_path / name, tmp_path / "fsdp")
        assert samples_by_step(tmp_path / name) == samples_by_step(tmp_path / "fsdp")
    norms = [row["grad_norm"] for row in rows(tmp_path / "fsdp/metrics.jsonl", "train")]
    assert max(norms) > 0.01, "nothing was clipped"


@pytest.mark.ddp
@pytest.mark.parametrize("task", slow_but(["classification"], sorted(SCRIPTS)))
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(task, collection, tmp_path):
    settings = [
        "loop.total_steps=14", "loop.global_batch_size=8", "loop.batch_size=2", "loop.ema_decay=0.95",
        "loop.checkpoint_every_steps=4", "loop.clip_grad_norm=1.0", *NOISY[task], FSDP,
    ]  # fmt: skip
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run(SCRIPTS[task], common(task, collection, uninterrupted, *settings), tmp_path, ranks=2)
    overrides = common(task, collection, killed, *settings)
    run(SCRIPTS[task], overrides, tmp_path, ranks=2, expect=-9, kill_at_step=10)
    assert "at step 8" in run(SCRIPTS[task], overrides, tmp_path, ranks=2)
    assert_same_tensors(checkpoint_tensors(uninterrupted, 14), checkpoint_tensors(killed, 14))
    assert rows(uninterrupted / "metrics.jsonl") == rows(killed / "metrics.jsonl")


LEGS = [(2, "ddp"), (2, "fsdp"), (3, "ddp"), (2, "fsdp"), (1, "ddp")]
MORE_LEGS = [(1, "fsdp"), (3, "fsdp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp"), (3, "ddp"), (1, "ddp"), (2, "fsdp")]


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "legs", "settings"),
    [("classification", MORE_LEGS, [])]
    + [(task, LEGS, []) for task in CHEAP if task != "classification"]
    + [("classification", LEGS, [optim]) for optim in ("optim=adan", "optim=sgd")],
)
def test_a_checkpoint_of_either_resumes_in_the_other_on_any_number_of_ranks(task, legs, settings, collection, tmp_path):
    """Six steps by each (ranks, way) of a run, killed after all but the last, against a run on one rank."""
    total, there, here = 6 * len(legs), tmp_path / "moved", tmp_path / "one"
    settings = [
        f"loop.total_steps={total}", "loop.global_batch_size=12", "loop.checkpoint_every_steps=6", "optim.lr=0.001",
        "loop.ema_decay=0.9", "loop.clip_grad_norm=0.5", *settings,
    ]  # fmt: skip
    for done, (ranks, way) in zip(range(0, total, 6), legs):
        overrides = common(task, collection, there, *settings, "loop.batch_size=3", f"runtime.parallel={way}")
        end = {"expect": -9, "kill_at_step": done + 6} if done + 6 < total else {}
        printed = run(SCRIPTS[task], overrides, tmp_path, ranks=ranks, **end)
        assert done == 0 or f"at step {done}" in printed
    run(SCRIPTS[task], common(task, collection, here, *settings), tmp_path)
    assert_same_tensors(checkpoint_tensors(there, total), checkpoint_tensors(here, total), tolerance=2e-5)
    assert samples_by_step(there) == samples_by_step(here)
    losses = [[row["loss"] for row in rows(path / "metrics.jsonl", "train")] for path in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == total


@pytest.mark.ddp
@pytest.mark.parametrize("optim", slow_but(["adamw"], ["adamw", "adan", "sgd"]))
def test_a_step_that_is_not_finite_changes_no_rank(optim, collection, tmp_path):
    """A loss of one rank, then one element of the gradient, which one rank alone holds; then nothing can be read."""
    settings = [
        "loop.total_steps=9", "loop.global_batch_size=9", "loop.checkpoint_every_steps=1", "loop.keep_checkpoints=9",
        "loop.ema_decay=0.9", "loop.clip_grad_norm=1.0", f"optim={optim}", "optim.lr=0.001", FSDP,
    ]  # fmt: skip
    path = tmp_path / "run"
    overrides = common("classification", collection, path, *settings)
    run("tests/tasks/troubled.py", overrides, tmp_path, ranks=3, variables={"TROUBLE": "skip_steps"})
    states = [checkpoint_tensors(path, step) for step in range(1, 10)]
    for before, after in ((3, 4), (5, 6), (7, 8)):
        assert_same_tensors(states[before - 1], states[after - 1])
    for before, after in ((2, 3), (4, 5), (6, 7), (8, 9)):
        assert any(not torch.equal(states[before - 1][name], states[after - 1][name]) for name in states[0])
    skipped = [row["skipped_steps"] for row in rows(path / "metrics.jsonl", "train")]
    assert skipped == [0, 0, 0, 1, 0, 1, 0, 1, 0]
    assert [row["what"] for row in rows(path / "skipped_steps.jsonl")] == ["loss", "gradient", "weight"]


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "tolerance"),
    [
        # Batch norm keeps each rank's own statistics, as under ddp.
        ("classification", ["model=timm", "model.name=test_resnet", "loop.ema_decay=0.9"], 2e-5),
        # Autocast over float32 parameters; the optimiser's kernel rounds the last elements of rows anew.
        ("fcmae", ["runtime.precision=bf16", "loop.clip_grad_norm=null"], 1e-6),
    ],
)
def test_batch_statistics_and_bfloat16_are_those_of_ddp(task, settings, tolerance, collection, tmp_path):
    settings = [*settings, "loop.total_steps=6", "loop.global_batch_size=8", "optim.lr=0.001"]
    for way in ("ddp", "fsdp"):
        overrides = common(task, collection, tmp_path / way, *settings, f"runtime.parallel={way}")
        timm = "model=timm" in settings
        overrides = [text for text in overrides if not timm or not text.startswith("model") or text in settings]
        run(SCRIPTS[task], overrides, tmp_path, ranks=2)
    assert_same_tensors(checkpoint_tensors(tmp_path / "ddp", 6), checkpoint_tensors(tmp_path / "fsdp", 6), tolerance)
    run("evaluate.py", [f"run_dir={tmp_path}/fsdp", "weights=last", "runtime.threads=1"], tmp_path)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.skipif(missing_for_compile("cpu"), reason="needs a C++ compiler")
def test_compiled_unit_by_unit(collection, tmp_path):
    settings = ["loop.total_steps=3", "loop.global_batch_size=8", "optim.lr=0.001", "runtime.deterministic=false", FSDP]
    for compiles in ("false", "true"):
        overrides = common("classification", collection, tmp_path / compiles, *settings, f"runtime.compile={compiles}")
        started = start("finetune.py", overrides, tmp_path, 2)
        assert started.wait(500) == [0, 0]
        assert ("compiling the units" in started.output) is (compiles == "true")
    losses = [[row["loss"] for row in rows(tmp_path / way / "metrics.jsonl", "train")] for way in ("false", "true")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- what is a unit, and what is refused


class Pair(nn.Module):
    """A block of two layers."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)


class Nested(nn.Module):
    """A block with a stack of blocks inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.ModuleList([Pair(8), Pair(8)]), nn.Linear(8, 8)


def test_units_are_blocks_in_stacks_and_nothing_else():
    block, small, nested = Pair(8), Pair(1), Nested()
    network = nn.Module()
    network.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8))  # bare layers
    network.stages = nn.Sequential(nn.Sequential(block, small), nn.ModuleList([nested]))
    network.head = Pair(16)  # in no stack
    found = find_units(network)
    assert set(found) == {block, nested, *nested.inner}  # `small` is not worth a collective
    assert found.index(nested) > max(found.index(inner) for inner in nested.inner)
    nested.inner[0].first.weight = block.first.weight  # of two blocks: it is in no unit
    assert find_units(network) == [nested.inner[1]]


def test_what_is_frozen_and_in_no_unit_is_kept_whole():
    task = Task()
    task.helpers = ("encoder",)
    task.network, task.encoder = Pair(8), nn.Module()
    task.encoder.stem, task.encoder.stack = nn.Linear(8, 8), nn.ModuleList([Pair(8)])
    machine = Runtime(torch.device("cpu"), "fp32", False, 0, 2)
    assert _keep_whole(task, find_units(task), machine) == set(task.encoder.stem.parameters())


def test_an_optimiser_of_whole_parameters_is_refused_before_a_folder_is_made(collection, tmp_path):
    data = ["data=image_folder", f"data.root={collection}", f"run_dir={tmp_path}/run"]
    overrides = [*data, "optim=timm", "optim.opt=lamb"]
    with pytest.raises(UserError, match=r"^runtime.parallel: fsdp gives each rank some rows"):
        run_here("finetune", [*SMALL_MODEL, *overrides, FSDP], tmp_path)
    assert not (tmp_path / "run").exists()
