"""Sparse execution. Reference equality in float64 (masked dense, forward and gradients): no removed pixel is seen."""

import copy

import pytest
import torch
from torch.nn import functional as F

from models.fcmae import FCMAE
from tests.models.test_fcmae import build, draw_masks, randomise

VARIANTS = {
    "plain": {},
    "grey, patches of 2 x 2 sites": {"image_hw": (48, 32), "in_channels": 1, "patch_px": 16},
    "stem stride 4, two stages": {"encoder": {"stem_stride": 4, "depths": [1, 2], "dims": [8, 12]}},
    "four stages, wide map": {
        "patch_px": 16, "image_hw": (64, 160), "encoder": {"depths": [1, 1, 2, 1], "dims": [4, 8, 12, 16]}
    },
    "two decoder blocks, mask ratio .3": {"decoder_depth": 2, "mask_ratio": 0.3},
}  # fmt: skip


class DenseFCMAE(FCMAE):
    """The same function on whole maps: convolutions read 0 at removed sites, and GRN sums over visible ones."""

    def encode(self, images, visible):
        grid = self.grid_of(images.shape[-2:])
        kept = images.new_zeros(len(images), grid[0] * grid[1], dtype=torch.bool).scatter(1, visible, True)
        kept = kept.view(-1, 1, *grid)

        def mask(x):
            return F.interpolate(kept.to(x), x.shape[-2:]) * x

        x = mask(images)
        for downsample, stage in zip(self.encoder.downsample_layers, self.encoder.stages):
            x = mask(downsample(x))
            for block in stage:
                own = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=x.shape[1])
                own = F.gelu(block.pwconv1(block.norm(own.permute(0, 2, 3, 1))))
                norms = mask(own.permute(0, 3, 1, 2)).square().sum((2, 3))[:, None, None].sqrt()
                share = norms / (norms.mean(-1, keepdim=True) + 1e-6)
                own = block.pwconv2(own * (1 + block.grn.gamma * share) + block.grn.beta)
                x = mask(x + own.permute(0, 3, 1, 2))
        return self.proj(x)


def both(variant, **changes):
    """One network in sparse and in dense execution, all parameters drawn, float64; images and masks."""
    torch.manual_seed(0)
    settings = {**VARIANTS[variant], **changes}
    size = settings.pop("image_hw", (32, 48))
    sparse = randomise(build(**settings)).double()
    dense = copy.deepcopy(sparse)
    dense.__class__ = DenseFCMAE
    images = torch.randn(3, settings.get("in_channels", 3), *size, dtype=torch.float64)
    return sparse, dense, images, draw_masks(3, sparse, size)


def run(fcmae, images, mask):
    """Prediction, loss, and every gradient by name."""
    pred = fcmae(images, mask)
    loss = fcmae.loss_per_sample(images, pred, mask)
    (loss.double() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    return pred, loss, {name: parameter.grad for name, parameter in fcmae.named_parameters()}


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
