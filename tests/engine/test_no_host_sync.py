"""What would make the host wait for a GPU is counted: `count` is for tests of whatever runs within a step.

On a CPU nothing waits, so the operations themselves are counted: reading a number (`item`, `bool`, `int`, `tolist`),
and what must know it to give its result a shape (`nonzero`, a boolean index). Whole steps: test_fake_cuda.py; on a GPU
torch's own sync debug mode raises. Steps that log, evaluate or save are excluded: those may wait.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import build_bench_run
from tests.small_tasks import BATCH, make_batch, make_setup

aten = torch.ops.aten

# What must read device memory on the host, or the shape of whose result depends on it.
READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.bincount.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Reads that no operation shows, and tensors made of Python numbers, which are copied to the device.
FUNCTIONS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu, torch.tensor, torch.as_tensor,
    torch.from_numpy,
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        if func in READS or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FUNCTIONS:
            self.found.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def count(body):
    """The names of all that would have waited while `body` ran."""
    found = []
    with Operations(found), Functions(found):
        body()
    return found


VALUES = torch.arange(4.0)
WAITS = {
    "item": lambda: VALUES.sum().item(),
    "cpu": VALUES.cpu,
    "a boolean index": lambda: VALUES[VALUES > 1],
    "a tensor of a number": lambda: VALUES * torch.tensor(2.0),
}
FREE = {"where": lambda: torch.where(VALUES > 1, VALUES, 0.0), "integers": lambda: VALUES[torch.arange(2)]}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_what_waits_is_counted_and_nothing_else(name):
    assert bool(count({**WAITS, **FREE}[name])) == (name in WAITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_fake_cuda.py does without")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", ["classification", "test_resnet", "fcmae", "tagging"])
def test_on_a_gpu_torchs_own_check_is_silent(task, precision, device="cuda"):
    from tests.fake_cuda import run_steps

    kind, setup = make_setup(task)
    runtime = {"device": device, "precision": precision, "deterministic": False}
    run = build_bench_run(
        kind.build(setup), batch_size=BATCH, accum_steps=2, runtime=runtime, optim={"option": "adamw"},
        loop={"ema_decay": 0.99},
    )  # fmt: skip
    batches = [make_batch(task, setup, device) for _ in range(2)]
    run_steps(run, batches)  # kernels are loaded and chosen, state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_steps(run, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
