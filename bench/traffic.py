"""What a rank of four sends in an update of two micro-batches: collectives in order, on torch's fake process group.

python bench/traffic.py                (convnextv2_tiny; seconds of one core: no bytes move)

All figures are shares of the parameters. reduced: in all. uncovered: after all gradients are computed, so that it
overlaps with nothing. largest: of a collective.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench.finetune_step import make_batch, make_task
from bench.measure import build_bench_run

RANKS = 4
SIZE = 32
LAST = "last gradient"
LEAST = 1000  # numbers; buffers and the denominator of the loss have fewer


class Sent(TorchDispatchMode):
    """The collectives of large tensors: their names and their numbers over all ranks."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [*itertools.chain(*(each if isinstance(each, list) else [each] for each in args[:2]))]
            count = max([each.numel() for each in tensors if isinstance(each, torch.Tensor)], default=0)
            if count > LEAST:
                self.calls.append((function.__name__.split(".")[0].strip("_"), count))
        return function(*args, **(kwargs or {}))


def reduce_bucket(state, bucket):
    """Reduce a bucket of DDP: its own call waits for a future, which the fake group does not have."""
    distributed.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def trace():
    """Return the collectives of an update, and each one's share of the parameters."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        task = make_task("convnextv2_tiny", SIZE)
        total = sum(parameter.numel() for parameter in task.parameters())
        learner = build_bench_run(task, batch_size=2, accum_steps=2, runtime={"device": "cpu"}).learner
        sent = Sent()
        learner.wrapped.register_comm_hook(None, reduce_bucket)
        first = next(task.parameters())
        first.register_post_accumulate_grad_hook(lambda parameter: sent.calls.append((LAST, 0)))
        batches = 2 * [make_batch(SIZE, 2, torch.device("cpu"))]
        learner.update(batches)  # DDP then orders its buckets by their gradients
        sent.calls.clear()
        with sent:
            learner.update(batches)
    finally:
        distributed.destroy_process_group()
    return [(name, count / total) for name, count in sent.calls]


def measure():
    """Return the figures of an update."""
    sent = trace()
    last = max(index for index, (name, _) in enumerate(sent) if name == LAST)
    uncovered = sum(share for _, share in sent[last + 1 :])
    return {
        "reduced": sum(share for _, share in sent),
        "uncovered": uncovered,
        "largest": max(share for _, share in sent),
    }


if __name__ == "__main__":
    figures = (f"{name} {share:.3f}" for name, share in measure().items())
    sys.stdout.write(f"{', '.join(figures)}\n")
