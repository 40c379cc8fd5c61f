"""Equality with the official ConvNeXt V2, in float64: literals that official_convnextv2.py computed from its files."""

import pytest
import torch

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tests.models import official_convnextv2 as official

# Of facebookresearch/ConvNeXt-V2 at 2553895753323c6fe0b2bf390683f5ea358a42b9.
LOGITS = [0.3768046869558309, 0.4917893130279272, -0.4593359394727076, -1.0129120263694211, -0.18158869796232763]
SQUARES = 0.3658598366609941  # of the predicted pixels: their mean
LOSS = 1.3652911219177932


def encoder(num_classes):
    return ConvNeXtV2(
        in_channels=3, depths=official.DEPTHS, dims=official.DIMS, stem_stride=4, drop_path_rate=0.0,
        head_init_scale=1.0, num_classes=num_classes,
    )  # fmt: skip


def fill(network):
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    network.double().load_state_dict(official.formula_weights(shapes))
    return network.eval()


@torch.no_grad()
def test_the_logits_are_the_official_ones():
    logits = fill(encoder(official.CLASSES))(official.formula_image())
    assert logits[0].tolist() == pytest.approx(LOGITS, rel=1e-13)


@torch.no_grad()
def test_the_loss_of_fcmae_is_the_official_one():
    settings = {"patch_px": official.PATCH_PX, "mask_ratio": 0.6, "decoder_dim": official.DECODER_DIM}
    fcmae = fill(FCMAE(encoder=encoder(0), decoder_depth=1, **settings))
    image, mask = official.formula_image(), official.formula_mask()
    predicted = fcmae(image, mask)
    assert predicted.square().mean().item() == pytest.approx(SQUARES, rel=1e-13)
    assert fcmae.loss_per_sample(image, predicted, mask).item() == pytest.approx(LOSS, rel=1e-6)  # float32
