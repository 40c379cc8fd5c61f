"""Whole steps on a GPU, where torch's sync debug mode raises if the host waits. Without one: test_fake_cuda.py.

Steps that log, evaluate or save are excluded: those may wait.
"""

import pytest
import torch

from bench.measure import build_bench_run
from tests.small_tasks import BATCH, make_batch, make_setup


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
