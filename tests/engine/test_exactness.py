"""Exactness, for every task: equality of whole runs, as real processes.

Resume equals the uninterrupted run bit for bit. Ranks and accumulation equal one rank up to summation order. Another
number of ranks sees the same samples.
"""

import pytest
import torch

from tests.support import (
    OF_DIFFUSERS,
    SCRIPTS,
    assert_equal_runs,
    assert_same_rows,
    assert_same_tensors,
    checkpoint_tensors,
    common,
    logged,
    rows,
    run,
    samples_by_step,
    training_log,
)

TASKS = sorted(SCRIPTS)
CHEAP = [task for task in TASKS if task not in OF_DIFFUSERS]  # their own tests resume them
# What draws inside the forward pass, so that resume has to bring it back; per task, where it has such a setting.
NOISY = {
    "fcmae": ["model.drop_path_rate=0.3"],
    "classification": ["model.drop_path_rate=0.3", "task.mixup_alpha=0.8", "task.cutmix_alpha=1.0"],
    "tagging": ["model.drop_path_rate=0.3", "task.mixup_alpha=0.8", "task.cutmix_alpha=1.0",
                "task.tag_weights={power: 1.0, window_steps: 4}"],
    "diffusion": [],
    "autoencoder": [],
    "multicrop": ["model.drop_path_rate=0.3"],
}  # fmt: skip


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    collection, tmp_path, task="classification", more=(), ranks=1
):
    """20 steps against 10 and some, SIGKILL of the process group, the same command again."""
    settings = [
        "loop.total_steps=20", "loop.batch_size=8", "loop.micro_batch_size=4", "loop.ema_decay=0.95",
        "loop.checkpoint_every_steps=4", "loop.evaluate_every_epochs=1.0", "loop.clip_grad_norm=1.0",
        "runtime.workers=2", *NOISY[task], *more,
    ]  # fmt: skip
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    run(SCRIPTS[task], common(task, collection, uninterrupted, *settings), tmp_path, ranks)
    overrides = common(task, collection, killed, *settings)
    run(SCRIPTS[task], overrides, tmp_path, ranks, expect=-9, kill_at_step=10)
    assert rows(killed / "metrics.jsonl")[-1]["step"] == 10, "the kill came elsewhere"
    printed = run(SCRIPTS[task], overrides, tmp_path, ranks)
    # Steps beyond the checkpoint are made again, mid-epoch (54 images by 8); the one of step 8 may not be written yet.
    assert "at step 8" in printed or "at step 4" in printed

    assert_equal_runs(uninterrupted, killed, 20)
    assert training_log(uninterrupted) == training_log(killed)
    assert rows(uninterrupted / "samples/rank_00000.jsonl") == rows(killed / "samples/rank_00000.jsonl")
    assert logged(killed, "train", "step") == list(range(1, 21))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the test above does the same on a CPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["classification", "fcmae"])
def test_on_a_gpu(task, precision, collection, tmp_path):
    """With runtime.deterministic=true, which runtime=reference sets."""
    more = ["runtime.device=cuda", f"runtime.precision={precision}"]
    test_killed_and_resumed_equals_uninterrupted_bit_for_bit(collection, tmp_path, task, more)


def assert_variants_are_equal(task, data, folder, settings, variants):
    """Four steps of each of the variants, name -> (ranks, words), to summation order; return what they printed."""
    length = ["loop.total_steps=4", "loop.batch_size=8", "loop.checkpoint_every_steps=4", "optim.lr=0.001"]
    printed = {}
    for name, (ranks, *words) in variants.items():
        overrides = common(task, data, folder / name, *length, *settings, *words)
        printed[name] = run(SCRIPTS[task], overrides, folder, ranks=ranks)
    first, *others = (folder / name for name in variants)
    for other in others:
        # Adam divides by the root of tiny second moments, so a parameter may move by 1e-4 of a learning rate more.
        assert_same_tensors(checkpoint_tensors(first, 4), checkpoint_tensors(other, 4), tolerance=2e-5)
        assert samples_by_step(first) == samples_by_step(other)
        assert_same_rows(first, other)
    return printed


def test_two_ranks_equal_one_at_the_same_global_batch(
    collection, tmp_path, task="classification", more=("loop.ema_decay=0.9", "loop.clip_grad_norm=0.01")
):
    """One rank with one micro-batch, one with four, two ranks: the same weights, losses and evaluations."""
    sizes = {"one": (1, 8), "accumulated": (1, 2), "two": (2, 4)}
    variants = {name: (ranks, f"loop.micro_batch_size={size}") for name, (ranks, size) in sizes.items()}
    assert_variants_are_equal(task, collection, tmp_path, more, variants)
