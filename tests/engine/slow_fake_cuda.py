"""Other tasks, optimisers and precisions on CUDA tensors that do not exist (tests/fake_cuda.py)."""

from importlib.util import find_spec

from tests.engine.test_fake_cuda import check, pytestmark, run_cases  # noqa: F401


def test_every_task_every_optimiser_and_every_precision():
    """Each optimiser and precision with one task: neither depends on it."""
    cases = ["classification:adamw:fp16", "test_resnet:sgd:fp32", "distillation:adamw:fp32", "tagging:sgd:fp16"]
    check(run_cases(*cases, *(["diffusion:adamw:bf16", "autoencoder:adamw:bf16"] if find_spec("diffusers") else [])))
