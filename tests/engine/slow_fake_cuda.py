"""Other optimisers and precisions, and the dearest task, on CUDA tensors that do not exist (tests/fake_cuda.py)."""

from tests.engine.test_fake_cuda import TASKS, check, pytestmark, run_cases  # noqa: F401


def test_every_optimiser_every_precision_and_diffusion():
    """Each with one task: neither depends on it."""
    cases = ["classification:adan:fp16", "test_resnet:sgd:fp32", "multicrop:adan:fp32", "tagging:sgd:fp16"]
    check(run_cases(*cases, *(["diffusion:adamw:bf16"] if "diffusion" in TASKS else [])))
