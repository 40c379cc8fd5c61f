"""Latents: images as SDXL's VAE encodes them."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents, float32 [B, 4, H / 8, W / 8], of images uint8 [B, 3, H, W]."""
    found = vae.encode((images.float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return found.mean.float(), found.logvar.float()
