"""Sharded training (runtime.parallel=fsdp). Equality of whole runs, as real processes, with one rank and with ddp to
summation order; refusals. Resuming, and steps that are not finite: slow_engine.py.
"""

import pytest
from torch import nn

from engine.update.parallel import find_units
from tests.engine.test_exactness import assert_variants_are_equal
from tests.in_process import SMALL_MODEL
from tests.in_process import run as run_here
from tests.support import refuses, rows

FSDP = "runtime.parallel=fsdp"


@pytest.mark.parametrize("case", ["fcmae runtime.grad_checkpointing=true"])
def test_sharded_equals_replicated_equals_one_rank(case, collection, tmp_path):
    """The same weights, optimiser state, average, losses and evaluations."""
    task, *settings = case.split()
    settings = ["loop.ema_decay=0.9", "loop.clip_grad_norm=0.01", *settings]
    halves = "loop.micro_batch_size=2"  # two ranks take two micro-batches each
    variants = {"one": (1, "loop.micro_batch_size=8"), "ddp": (2, halves), "fsdp": (2, halves, FSDP)}
    for name, said in assert_variants_are_equal(task, collection, tmp_path, settings, variants).items():
        assert ("MiB of parameters on this rank" in said) is (name == "fsdp")
    norms = [row["grad_norm"] for row in rows(tmp_path / "fsdp/metrics.jsonl", "train")]
    assert max(norms) > 0.01, "nothing was clipped"


# --- what is a unit, and what is refused


class Pair(nn.Module):
    """A block of two layers."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)


def test_units_are_blocks_in_stacks_and_nothing_else():
    block, small, other = Pair(8), Pair(1), Pair(8)
    network = nn.Module()
    network.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8))  # bare layers
    network.stages = nn.Sequential(nn.Sequential(block, small), nn.ModuleList([other]))
    network.head = Pair(16)  # in no stack
    assert set(find_units(network)) == {block, other}  # `small` is not worth a collective
    other.first.weight = block.first.weight  # of two blocks: it is in no unit
    assert not {block, other} & set(find_units(network))


def test_an_optimiser_of_whole_parameters_is_refused_before_a_folder_is_made(collection, tmp_path):
    data = ["data=image_folder", f"data.root={collection}", f"run_dir={tmp_path}/run"]
    overrides = [*data, "optim=timm", "optim.opt=lamb"]
    with refuses(r"^runtime.parallel: fsdp gives each rank some rows"):
        run_here("finetune", [*SMALL_MODEL, *overrides, FSDP], tmp_path)
    assert not (tmp_path / "run").exists()
