"""FCMAE. Round trips (patches), properties (mask counts), refusals. Loss: test_official.py. Leaks: test_sparse.py."""

import torch
from torch import nn

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, count_removed, draw_mask
from models.layers import patchify

SETTINGS = {"patch_px": 8, "mask_ratio": 0.6, "decoder_dim": 24, "decoder_depth": 1}


def build(*, in_channels=3, encoder=None, **changes):
    settings = {"depths": [1, 1, 1], "dims": [8, 12, 16], "stem_stride": 2, "drop_path_rate": 0.0, "head_init_scale": 1}
    encoder = ConvNeXtV2(in_channels=in_channels, num_classes=0, **{**settings, **(encoder or {})})
    return FCMAE(encoder=encoder, **{**SETTINGS, **changes})


def randomise(network):
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def draw_masks(batch, fcmae, size=(32, 48)):
    rows, columns = fcmae.grid_of(size)
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw_mask(generator, rows * columns, fcmae.mask_ratio) for _ in range(batch)])


def mask_pixels(mask, fcmae, size=(32, 48)):
    """The mask as pixels, bool [B, 1, H, W]."""
    grid = mask.reshape(-1, 1, *fcmae.grid_of(size))
    return grid.repeat_interleave(fcmae.patch_px, 2).repeat_interleave(fcmae.patch_px, 3)


def test_a_mask_removes_the_stated_count():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        mask = draw_mask(generator, 49, 0.6)
        assert mask.dtype == torch.bool and mask.shape == (49,) and mask.sum() == 30 == count_removed(49, 0.6)


@torch.no_grad()
def test_a_patch_of_several_sites_takes_each_pixel_from_its_own_site():
    """With a `pred` that tells each site's place in the map, the patches must show it."""
    torch.manual_seed(0)
    fcmae = build(patch_px=16, decoder_depth=0)
    images, mask = torch.randn(1, 3, 32, 48), draw_masks(1, fcmae)
    sites = torch.arange(4 * 6.0).view(1, 1, 4, 6)
    fcmae.decoder = nn.Sequential()
    fcmae.decoder.forward = lambda x: sites.expand(-1, 24, -1, -1) * torch.ones_like(x)
    fcmae.pred.weight.zero_()
    fcmae.pred.weight[:, 0] = 1.0  # each pixel of a site shows the site's number
    pred = fcmae(images, mask)
    shown = sites.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert torch.equal(pred + 0, patchify(shown, 16)[mask].view_as(pred))


def test_the_perfect_prediction_paints_the_image():
    torch.manual_seed(0)
    fcmae = build(in_channels=4, patch_px=16)
    images, mask = torch.rand(2, 4, 32, 48), draw_masks(2, fcmae)
    target = patchify(images, 16)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    target = target[mask].view(2, -1, target.shape[2])
    painted = fcmae.reconstruct(images, target, mask)
    visible = ~mask_pixels(mask, fcmae).expand_as(images)
    torch.testing.assert_close(painted, images)
    assert torch.equal(painted[visible], images[visible])
    assert (fcmae.loss_per_sample(images, target, mask) < 1e-9).all()
