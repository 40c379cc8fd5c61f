"""Other tasks, optimisers and precisions on CUDA tensors that do not exist (tests/fake_cuda.py)."""

import pytest

from tests.engine.test_fake_cuda import check, pytestmark, run_cases  # noqa: F401


@pytest.mark.parametrize(
    "cases",
    [
        "classification:adamw:fp16 test_resnet:sgd:fp32 tagging:sgd:fp16",
        "diffusion:adamw:bf16 autoencoder:adamw:bf16",
    ],
)
def test_every_task_every_optimiser_and_every_precision(cases):
    """Each optimiser and precision with one task: neither depends on it."""
    if "diffusion" in cases:
        pytest.importorskip("diffusers", reason="make install-sdxl")
    check(run_cases(*cases.split()))
