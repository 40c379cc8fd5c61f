"""Latents: images as SDXL's VAE encodes them."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents, float32 [B, 4, H / 8, W / 8], of images uint8 [B, 3, H, W].

    In the VAE's own dtype: SDXL's overflows in float16.
    """
    with torch.autocast(images.device.type, enabled=False):
        found = vae.encode((images.float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return found.mean.float(), found.logvar.float()


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Return the images, uint8 [B, 3, H, W], of scaled latents [B, 4, h, w]; in the VAE's own dtype."""
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype)).sample
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
