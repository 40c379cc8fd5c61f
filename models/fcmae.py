"""FCMAE: a ConvNeXt V2 learns without labels by predicting masked patches (pretrain_fcmae.py).

A mask is bool [B, L] over the patch grid in row-major order, True = removed; a patch is a vector [P] (`patchify`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convnextv2 import Block, ConvNeXtV2, init_weights
from models.layers import patchify, unpatchify
from models.sparse import encode_visible, place_sites
from utils.errors import UserError


def count_removed(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` a mask removes: all but int(num_patches * (1 - mask_ratio)).

    Source: facebookresearch/ConvNeXt-V2:models/fcmae.py, with its rounding: at 0.6, 19 of 49 patches are kept.
    """
    return num_patches - int(num_patches * (1 - mask_ratio))


def draw_mask(generator: torch.Generator, num_patches: int, mask_ratio: float) -> Tensor:
    """Draw a mask, bool [L] on the generator's device, that removes exactly `count_removed` patches."""
    order = torch.randperm(num_patches, generator=generator, device=generator.device)
    mask = torch.zeros(num_patches, dtype=torch.bool, device=generator.device)
    mask[order[: count_removed(num_patches, mask_ratio)]] = True
    return mask


def repeat_sites(sites: Tensor, factor: int) -> Tensor:
    """Repeat each site of a bool map [B, h, w] to factor x factor sites: [B, h * factor, w * factor]."""
    return sites.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def check_patch_grid(total_stride: int, image_size_hw: tuple[int, int], patch_px: int) -> None:
    """Raise UserError unless a patch is a whole number of encoder sites, and the image a whole number of patches."""
    if patch_px < 1 or patch_px % total_stride != 0:
        raise UserError(
            f"task.patch_px: {patch_px} is not a multiple of the encoder's total stride {total_stride}; "
            f"set it to {total_stride} or a multiple of it"
        )
    if any(side < 1 or side % patch_px != 0 for side in image_size_hw):
        raise UserError(
            f"augment.image_size_hw: {list(image_size_hw)} is not a multiple of task.patch_px={patch_px} on both "
            f"sides; set both sides to multiples of {patch_px}, or task.patch_px to a multiple of {total_stride} "
            "that divides both"
        )


class FCMAE(nn.Module):
    """Encode the visible patches with `encoder`, fill the gaps with a learned token, and predict the removed patches.

    Encoder and decoder work on the grid of the total stride. A patch may be several sites wide, and each site predicts
    its own pixels. Images have a whole number of patches; all images of a batch have one size. The decoder and the mask
    token start normal with std .02, like the encoder. Only visible sites are computed (models/sparse.py), and only
    removed patches are predicted.

    Source: Woo et al. 2023 (arXiv 2301.00808), section 3; facebookresearch/ConvNeXt-V2:models/fcmae.py.
    Differs: plain tensors instead of MinkowskiEngine's, GRN per sample, any channels and image shape, patches wider
    than the stride, and a single initialisation (the published code initialises the encoder twice, finally with std 1).
    """

    # The weights that read the images; then prefixes of names that may be missing: no head, and perhaps no decoder.
    first_convolutions = ("encoder.downsample_layers.0.0.weight",)
    head_prefixes = ()
    norm_prefixes = ("decoder.", "mask_token", "proj.", "pred.")

    def __init__(
        self,
        *,
        encoder: ConvNeXtV2,
        patch_px: int,
        mask_ratio: float,
        decoder_dim: int,
        decoder_depth: int,
    ) -> None:
        super().__init__()
        # A head's parameters would get no gradient, which DDP refuses.
        assert encoder.num_classes == 0 and patch_px % encoder.total_stride == 0, (encoder.num_classes, patch_px)
        self.patch_px = patch_px
        self.mask_ratio = mask_ratio
        self.patch_sites = patch_px // encoder.total_stride  # sites of the encoder's last map per side of a patch

        self.encoder = encoder
        self.proj = nn.Conv2d(encoder.num_features, decoder_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = nn.Sequential(*[Block(decoder_dim, drop_path_rate=0.0) for _ in range(decoder_depth)])
        self.pred = nn.Conv2d(decoder_dim, encoder.total_stride**2 * encoder.in_channels, kernel_size=1)
        # Not self.apply, because the encoder is already initialised.
        for part in (self.proj, self.decoder, self.pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the encoder recompute its blocks in the backward pass to save memory."""
        self.encoder.set_grad_checkpointing(enable)

    def last_layer(self, kind: str) -> int:
        """Return the encoder's highest layer for layer decay."""
        return self.encoder.last_layer(kind)

    def layer_of(self, name: str, kind: str) -> int:
        """Return the layer of a parameter for layer decay; the decoder is one layer above the encoder."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."), kind)
        return self.last_layer(kind) + 1

    def grid_of(self, size_hw: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of the patches of an image."""
        height, width = size_hw
        assert height % self.patch_px == width % self.patch_px == 0, (size_hw, self.patch_px)
        return height // self.patch_px, width // self.patch_px

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the visible patches, int64 [B, V], and of the removed ones, [B, M], both ascending.

        mask: bool [B, L] with exactly M = `count_removed` patches removed in each sample (`draw_mask`).
        """
        assert mask.dtype == torch.bool, mask.dtype
        patches = mask.shape[1]
        removed = count_removed(patches, self.mask_ratio)
        return mask.int().argsort(dim=1, stable=True).split([patches - removed, removed], dim=1)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict the removed patches in ascending order, [B, M, P] in the units of the target.

        images: float [B, C, H, W], with any values at masked pixels; mask: bool [B, L].
        """
        grid_hw = self.grid_of(images.shape[-2:])
        visible, removed = self.split(mask)
        gaps = repeat_sites(mask.view(len(mask), *grid_hw), self.patch_sites)[:, None]
        x = self.encode(images, visible)
        x = self.decoder(torch.where(gaps, self.mask_token.to(x.dtype), x))
        sites = place_sites(removed, grid_hw, self.patch_sites).from_map(x)
        pixels = F.linear(sites, self.pred.weight.flatten(1), self.pred.bias)
        # A pixel's row in its patch is (site row, row in the site), and likewise for columns.
        stride = self.encoder.total_stride
        side = self.patch_sites
        pixels = pixels.reshape(-1, removed.shape[1], side, side, stride, stride, self.encoder.in_channels)
        return pixels.transpose(3, 4).flatten(2)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Return the decoder's input [B, C, h, w] at the visible patches, int64 [B, V]; other sites have any values."""
        tokens = encode_visible(self.encoder, images, visible, self.patch_px)
        tokens = F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)
        return place_sites(visible, self.grid_of(images.shape[-2:]), self.patch_sites).to_map(tokens)

    def loss_per_sample(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error over each sample's removed patches, float32 [B].

        images: [B, C, H, W]; pred: [B, M, P]; mask: bool [B, L]. Each target patch is normalised by its own mean and
        standard deviation. The pixels of visible patches do not affect the loss.
        """
        target, mean, std = self._target(images, mask)
        return (pred.float() - (target - mean) / std).square().mean(dim=(1, 2))

    def _target(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the removed patches, float32 [B, M, P], and their mean and standard deviation [B, M, 1].

        The variance is unbiased, and 1e-6 is added to it, so that a constant patch stays finite.
        """
        target = patchify(images.float(), self.patch_px).take_along_dim(self.split(mask)[1][..., None], dim=1)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
        return target, mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the images with the masked patches replaced by `pred`, float32 [B, C, H, W].

        The prediction is scaled back by the target patch's mean and standard deviation.
        """
        _, mean, std = self._target(images, mask)
        patches = patchify(images.float(), self.patch_px)
        removed = self.split(mask)[1][..., None].expand(-1, -1, patches.shape[2])
        return unpatchify(patches.scatter(1, removed, pred.float() * std + mean), self.patch_px, images.shape[-2:])
