"""SDXL's micro-conditioning: the U-Net is told the size of the file, the crop, and the size of the picture.

Source: Podell et al. 2023 (arXiv 2307.01952), section 2.2.
"""

import torch
from torch import Tensor


def time_ids(original_size_hw: Tensor, crop_top_left_yx: Tensor, target_size_hw: Tensor) -> Tensor:
    """Return the ids float32 [B, 6] from three integer tensors [B, 2].

    original_size_hw: of the file. crop_top_left_yx: where the crop begins in the resized image, mirrored where the crop
    is. target_size_hw: of the crop.
    """
    return torch.cat([original_size_hw, crop_top_left_yx, target_size_hw], dim=1).float()


def unet_inputs(pooled_prompt_embeds: Tensor, time_ids: Tensor) -> dict[str, Tensor]:
    """Return the U-Net's `added_cond_kwargs`. pooled_prompt_embeds: [B, 1280]. time_ids: float32 [B, 6].

    Never cast the ids: bfloat16 rounds sizes from 1,024 to 2,048 to multiples of 8.
    """
    assert time_ids.dtype == torch.float32, time_ids.dtype
    return {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
