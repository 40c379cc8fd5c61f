"""Equality with the official ConvNeXt V2, in float64: literals that its own files gave.

tests/models/official_convnextv2.py of 867acae8 computed them from facebookresearch/ConvNeXt-V2 at
2553895753323c6fe0b2bf390683f5ea358a42b9. Weights, image and mask are formulas, so both begin equal without a file.
"""

import re

import pytest
import torch

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE

LOGITS = [0.3768046869558309, 0.4917893130279272, -0.4593359394727076, -1.0129120263694211, -0.18158869796232763]
SQUARES = 0.3658598366609941  # of the predicted pixels: their mean
LOSS = 1.3652911219177932
PATCH_PX, SIDE_PX, VISIBLE = 32, 96, [1, 3, 8]


def wave(shape, shift):
    """Return numbers from -1 to 1, by a formula."""
    return torch.sin(0.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + shift).view(shape)


IMAGE = wave((1, 3, SIDE_PX, SIDE_PX), 0.1)


def encoder(num_classes):
    return ConvNeXtV2(
        in_channels=3, depths=[1, 2, 1, 1], dims=[4, 8, 12, 16], stem_stride=4, drop_path_rate=0.0,
        head_init_scale=1.0, num_classes=num_classes,
    )  # fmt: skip


def fill(network):
    """Give a network the weights of the formula: norm scales near 1, everything else near 0."""
    scale = re.compile(r"norm\S*\.weight|downsample_layers\.(0\.1|[1-3]\.0)\.weight")
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = {
        name: float(bool(scale.search(name))) + 0.3 * wave(shapes[name], number)
        for number, name in enumerate(sorted(shapes))
    }
    network.double().load_state_dict(weights)
    return network.eval()


@torch.no_grad()
def test_the_logits_are_the_official_ones():
    assert fill(encoder(5))(IMAGE)[0].tolist() == pytest.approx(LOGITS, rel=1e-13)


@torch.no_grad()
def test_the_loss_of_fcmae_is_the_official_one():
    fcmae = fill(FCMAE(encoder=encoder(0), decoder_depth=1, patch_px=PATCH_PX, mask_ratio=0.6, decoder_dim=8))
    mask = torch.ones(1, (SIDE_PX // PATCH_PX) ** 2, dtype=torch.bool)
    mask[:, VISIBLE] = False
    predicted = fcmae(IMAGE, mask)
    assert predicted.square().mean().item() == pytest.approx(SQUARES, rel=1e-13)
    assert fcmae.loss_per_sample(IMAGE, predicted, mask).item() == pytest.approx(LOSS, rel=1e-6)  # float32
