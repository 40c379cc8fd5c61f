"""The normalisation of images, on the device: batches hold bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError


class Normalise(nn.Module):
    """Map uint8 images [B, C, H, W] to (x / 255 - mean) / std in float32; float images must be in [0, 1] already.

    mean, std: one number per channel, for values in [0, 1]. They are settings and so not in state dicts.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UserError(
                    f"augment.{name}: {len(values)} numbers for a network with {channels} input channels "
                    "(model.in_channels); give one per channel"
                )
        shape = (1, channels, 1, 1)  # and values in a dry run, too
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(shape), persistent=False)
        # In units of bytes, so that bytes need no division by 255.
        self.register_buffer("_byte_mean", 255.0 * self.mean, persistent=False)
        self.register_buffer("_byte_std", 255.0 * self.std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [B, C, H, W], in the memory format of the images."""
        if images.dtype != torch.uint8:
            return (images.float() - self.mean).div_(self.std)
        if images.device.type != "cpu" or images.is_contiguous() or torch.compiler.is_compiling():
            return images.float().sub_(self._byte_mean).div_(self._byte_std)
        # On flattened rows, because torch is slow on an axis of three channels.
        mean, std = (each.flatten().repeat(images.shape[3]) for each in (self._byte_mean, self._byte_std))
        rows = images.permute(0, 2, 3, 1).flatten(2).float().sub_(mean).div_(std)
        return rows.unflatten(2, (images.shape[3], -1)).permute(0, 3, 1, 2)

    def undo(self, images: Tensor) -> Tensor:
        """Return uint8 images from normalised ones, clipped."""
        return ((images.float() * self.std + self.mean) * 255.0).round().clamp(0, 255).to(torch.uint8)
