"""What this machine's processors can do."""

import torch


def has_bf16(device: str) -> bool:
    """Return whether this machine's CPU or GPU (`device`: cpu or cuda) multiplies bf16 natively."""
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
