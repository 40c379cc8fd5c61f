"""Sparse execution. Reference equality in float64 (masked dense, forward and gradients), properties (batch, memory)."""

import copy

import pytest
import torch

from models.sparse import encode_visible
from tests.models.test_fcmae import build, draw_masks, randomise

VARIANTS = {
    "plain": {},
    "grey, patches of 2 x 2 sites": {"image_hw": (48, 32), "in_channels": 1, "patch_px": 16},
    "stem stride 1": {"encoder": {"stem_stride": 1}},
    "stem stride 4, two stages": {"encoder": {"stem_stride": 4, "depths": [1, 2], "dims": [8, 12]}},
    "four stages, wide map": {
        "patch_px": 16, "image_hw": (64, 160), "encoder": {"depths": [1, 1, 2, 1], "dims": [4, 8, 12, 16]}
    },
    "two decoder blocks, plain pixels, mask ratio .3": {"decoder_depth": 2, "norm_pix_loss": False, "mask_ratio": 0.3},
}  # fmt: skip


def both(variant, **changes):
    """One network in sparse and in dense execution, all parameters drawn, float64; images and masks."""
    torch.manual_seed(0)
    settings = {**VARIANTS[variant], **changes}
    size = settings.pop("image_hw", (32, 48))
    sparse = randomise(build(**settings)).double()
    dense = copy.deepcopy(sparse)
    dense.execution = "dense"
    images = torch.randn(3, settings.get("in_channels", 3), *size, dtype=torch.float64)
    return sparse, dense, images, draw_masks(3, sparse, size)


def run(fcmae, images, mask):
    """Prediction, loss, and every gradient by name."""
    pred = fcmae(images, mask)
    loss = fcmae.loss_per_sample(images, pred, mask)
    (loss.double() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    gradients = {name: parameter.grad for name, parameter in fcmae.named_parameters()}
    return pred, loss, gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_equals_masked_dense_forward_and_gradients(variant):
    sparse, dense, images, mask = both(variant)
    found, expected = run(sparse, images, mask), run(dense, images, mask)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)  # the loss is float32
    for name, gradient in expected[2].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=3e-7 * scale, msg=name)


def test_a_step_by_step_reference_of_one_sample():
    """Visible sites alone, by lists of coordinates: nothing of models/sparse.py or of the masked form is used."""
    sparse, _, images, mask = both("plain")
    encoder, image = sparse.encoder, images[0]
    kept = [divmod(number, 6) for number in (~mask[0]).nonzero().flatten().tolist()]
    visible = torch.zeros(4, 6, dtype=torch.bool)
    for row, column in kept:
        visible[row, column] = True
    x = image[None]
    for index, (downsample, stage) in enumerate(zip(encoder.downsample_layers, encoder.stages)):
        side = 4 >> index
        sites = visible.repeat_interleave(side, 0).repeat_interleave(side, 1)
        x = torch.where(sites, downsample(x), 0.0)
        for block in stage:
            rows = block.norm(block.dwconv(x)[0].permute(1, 2, 0)[sites])
            hidden = torch.nn.functional.gelu(block.pwconv1(rows))
            share = hidden.norm(dim=0) / (hidden.norm(dim=0).mean() + 1e-6)
            hidden = block.grn.gamma.flatten() * hidden * share + block.grn.beta.flatten() + hidden
            out = x.clone()
            out[0].permute(1, 2, 0)[sites] += block.pwconv2(hidden)
            x = out
    expected = x[0].permute(1, 2, 0)[visible]
    found = encode_visible(encoder, images[:1], sparse.split(mask[:1])[0], 8)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-10, atol=1e-10)
