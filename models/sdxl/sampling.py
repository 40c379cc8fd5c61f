"""Pictures from SDXL's networks by diffusers' pipeline: trailing timesteps and rescaled guidance.

Source: Lin et al. 2023 (arXiv 2305.08891), sections 3.3 and 3.4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.sdxl.step import BETA_FIRST, BETA_LAST, TIMESTEP_COUNT, PredictionType, decode_latents


class Prompts(NamedTuple):
    """Encoded prompts: prompt_embeds [B, L, D], pooled_prompt_embeds [B, P], and those of the empty one, of size 1."""

    embeds: Tensor
    pooled: Tensor
    empty_embeds: Tensor
    empty_pooled: Tensor


class SamplingSettings(NamedTuple):
    """How pictures are made. hw: their size in pixels. seeds: one for each prompt."""

    hw: tuple[int, int]
    steps: int
    guidance: float
    rescale: float
    seeds: Sequence[int]


def scheduler_config(prediction_type: PredictionType, zero_terminal_snr: bool) -> dict[str, object]:
    """Return the values of a scheduler of diffusers that samples what was trained."""
    return {
        "beta_start": BETA_FIRST,
        "beta_end": BETA_LAST,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": TIMESTEP_COUNT,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def sample_pictures(
    unet: nn.Module, vae: nn.Module, prompts: Prompts, scheduler: dict[str, object], settings: SamplingSettings
) -> np.ndarray:
    """Return a picture for each prompt, uint8 [B, H, W, 3]; the same for the same seed on any number of prompts."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(**scheduler), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    height, width = settings.hw
    pictures = []
    for number, seed in enumerate(settings.seeds):
        found = pipeline(
            prompt_embeds=prompts.embeds[number : number + 1],
            pooled_prompt_embeds=prompts.pooled[number : number + 1],
            negative_prompt_embeds=prompts.empty_embeds,
            negative_pooled_prompt_embeds=prompts.empty_pooled,
            height=height, width=width, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
            guidance_rescale=settings.rescale, generator=torch.Generator().manual_seed(seed), output_type="latent",
        )  # fmt: skip
        pictures.append(decode_latents(vae, found.images)[0].permute(1, 2, 0).cpu().numpy())
    return np.stack(pictures)
