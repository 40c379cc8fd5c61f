"""The base model that a configuration names, and images as its VAE encodes them."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from models.sdxl.config import SDXLConfig
from models.sdxl.names import PARTS
from models.sdxl.networks import SDXLNetworks, load_networks, tiny_networks

_SUFFIXES = (".safetensors", ".json")


def open_networks(model: SDXLConfig, parts: Collection[str], *, frozen: bool = False) -> SDXLNetworks:
    """Return some networks (PARTS) of the base model, or tiny ones; of its own dtype where they are `frozen`.

    Under `torch.device("meta")`, shapes alone are read. Raises UserError (`model.path`).
    """
    dtype = getattr(torch, model.frozen_dtype) if frozen else torch.float32
    if model.path is not None:
        return load_networks(model.path, "model.path", only=parts, dtype=dtype)
    networks = tiny_networks(seed=0)
    for part in PARTS:
        setattr(networks, part, getattr(networks, part).to(dtype) if part in parts else None)
    return networks


def base_files(model: SDXLConfig) -> list[Path]:
    """Return the files of the base model, in order; of tiny networks there are none."""
    if model.path is None:
        return []
    path = Path(model.path)
    return sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES) if path.is_dir() else [path]


def encode_images(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents, float32 [B, 4, H / 8, W / 8], of images uint8 [B, 3, H, W]."""
    found = vae.encode((images.float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return found.mean.float(), found.logvar.float()
