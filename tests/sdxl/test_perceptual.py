"""The latent perceptual loss: equal to a naive computation, and part of the task's loss at low noise alone."""

import pytest
import torch

from sdxl.latent_perceptual import perceptual_loss

pytest.importorskip("diffusers", reason="make install-sdxl")


@pytest.fixture(scope="module")
def vae():
    from sdxl.files.family import draw_networks

    torch.manual_seed(0)
    return draw_networks()["vae"].eval().requires_grad_(False)


def naive(vae, predicted, true):
    """One sample, one feature, one channel after the other; the features are caught while the whole VAE decodes."""
    caught = []
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    hooks = [block.register_forward_hook(lambda *call: caught.append(call[2].detach().double())) for block in blocks]
    vae.decode(predicted)
    vae.decode(true)
    for hook in hooks:
        hook.remove()
    losses = []
    for number, (x, y) in enumerate(zip(caught[: len(blocks)], caught[len(blocks) :])):
        scale = 2 ** [0, 1, 2, 3, 3][number]
        kept = [abs(channel - channel.mean()) <= 4 * channel.std(correction=0) for channel in y[0]]
        norm = sum((channel * mask) ** 2 for channel, mask in zip(y[0], kept)) ** 0.5
        norm = norm.clamp_min(float(norm.mean()) / 10)
        means = [(((a - b) / norm)[mask] ** 2).mean() for a, b, mask in zip(x[0], y[0], kept)]
        losses.append(sum(means) / len(means) / scale)
    return float(sum(losses) / len(losses))


def test_it_equals_a_naive_computation_on_a_fixed_batch(vae):
    draw = torch.Generator().manual_seed(1)
    true = torch.randn(3, 4, 8, 12, generator=draw)
    true[1, 2, 3, 4] = 60.0  # makes outliers
    predicted = (true + 0.3 * torch.randn(true.shape, generator=draw)).requires_grad_()
    found = perceptual_loss(vae, predicted, true)
    expected = [naive(vae, predicted[[number]], true[[number]]) for number in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4) and min(expected) > 1e-6
    found.sum().backward()
    assert predicted.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    assert perceptual_loss(vae, true, true).abs().max() == 0


def test_the_task_adds_it_at_low_noise_and_leaves_the_evaluation_loss(collection, tmp_path):
    from tests.in_process import run
    from tests.support import common, rows

    figures = []
    for name, value in (("off", "null"), ("on", "{weight: 2.0, min_snr: 1.0}")):
        words = ["loop.total_steps=1", "schedule.warmup_steps=1", "loop.batch_size=8", "loop.micro_batch_size=4"]
        words.append(f"task.loss.perceptual={value}")
        run("finetune_sdxl", common("diffusion", collection, tmp_path / name, *words), tmp_path)
        figures.append(rows(tmp_path / name / "metrics.jsonl"))
    (off, *_), (on, *_, evaluated) = figures
    assert "perceptual" not in off and on["perceptual"] > 0 and evaluated["perceptual"] > 0
    assert on["loss"] == pytest.approx(off["loss"] + 2.0 * on["perceptual"], rel=1e-5)
