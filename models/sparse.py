"""Sparse execution of a ConvNeXt V2: compute only the visible patches, in plain tensors.

A mask removes whole patches, and every sample keeps the same number, so the visible sites of a batch are an ordinary
tensor of tokens. Layers that work on single sites or on 2x2 cells (stem, layer norm, pointwise layers, GRN,
downsampling) run on the tokens. Only the depthwise 7x7 reads neighbours. It runs on the dense map with masked sites set
to 0, and its visible sites are gathered again.

Legend of shapes
    B samples, C channels; L patches per image, V of them visible, numbered by row
    r sites per side of a patch: 8, 4, 2, 1 over four stages if a patch is one site of the last map
    tokens [B, V, r, r, C]: patches in ascending order, sites of a patch by row

Masked pixels are never read, so they may be NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convnextv2 import ConvNeXtV2
from models.layers import LayerNorm, Sites, patchify


def place_sites(patches: Tensor, grid_hw: tuple[int, int], side: int) -> Sites:
    """Return the sites of some patches, int64 [B, V], with side x side sites each.

    grid_hw: the number of patches per column and row of an image.
    """
    grid_h, grid_w = grid_hw
    batch = len(patches)
    height = grid_h * side
    width = grid_w * side
    steps = torch.arange(side, device=patches.device)
    rows = (patches // grid_w * side)[..., None, None] + steps[:, None]  # [B, V, r, 1]
    columns = (patches % grid_w * side)[..., None, None] + steps  # [B, V, 1, r]
    samples = torch.arange(batch, device=patches.device)[:, None, None, None]
    return Sites(((samples * height + rows) * width + columns).flatten(), batch, height, width)


def _strided_convolution(convolution: nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a convolution with kernel = stride = k within the patches, as a linear layer on joined neighbours.

    [B, V, r, r, C] to [B, V, r / k, r / k, C'].
    """
    batch, count, side, _, channels = tokens.shape
    k = convolution.stride[0]
    cells = tokens.reshape(batch, count, side // k, k, side // k, k, channels).transpose(3, 4).flatten(4)
    return F.linear(cells, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


def encode_visible(encoder: ConvNeXtV2, images: Tensor, patches: Tensor, patch_px: int) -> Tensor:
    """Return the last feature map at the visible patches, tokens [B, V, r, r, C_last].

    images: float [B, C, H, W] in whole patches, with any values under the mask; patches: int64 [B, V], the indices of
    the visible patches; patch_px: a multiple of the encoder's total stride.
    """
    height, width = images.shape[-2:]
    convolution, norm = encoder.downsample_layers[0]
    pixels = patchify(images, patch_px).unflatten(2, (patch_px, patch_px, -1))  # [B, L, S, S, C]
    tokens = pixels.take_along_dim(patches[:, :, None, None, None], dim=1)
    tokens = LayerNorm.forward(norm, _strided_convolution(convolution, tokens))
    for index, stage in enumerate(encoder.stages):
        if index > 0:
            norm, convolution = encoder.downsample_layers[index]
            tokens = _strided_convolution(convolution, LayerNorm.forward(norm, tokens))  # channels are last
        sites = place_sites(patches, (height // patch_px, width // patch_px), tokens.shape[2])
        tokens = encoder.run_stage(stage, tokens, sites)
    return tokens
