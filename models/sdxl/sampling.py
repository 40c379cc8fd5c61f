"""Generate pictures with diffusers' pipeline: trailing timesteps and rescaled guidance.

Source: Lin et al. 2023 (arXiv 2305.08891), sections 3.3 and 3.4.
"""

from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from models.sdxl.step import SCHEDULE, TIMESTEP_COUNT, PredictionType, decode_latents, find_text
from models.sdxl.tokenizer import LENGTH
from utils.config.bounds import Factor, Fraction, Seed, Side
from utils.config.schema import Strict
from utils.ranks.signals import check_stop


class Prompts(NamedTuple):
    """Encoded prompts: prompt_embeds [B, L, D], pooled_prompt_embeds [B, P], and both for the empty prompt (B = 1).

    L of the empty prompt is 77.
    """

    embeds: Tensor
    pooled: Tensor
    empty_embeds: Tensor
    empty_pooled: Tensor


class SamplesConfig(Strict):
    """Pictures of an evaluation, one per prompt, with fixed noise.

    guidance_rescale: Lin et al. 2023, section 3.4.
    """

    prompts: list[str]
    image_size_hw: Annotated[list[Annotated[Side, Field(multiple_of=8)]], Field(min_length=2, max_length=2)]
    steps: Annotated[int, Field(ge=1, le=TIMESTEP_COUNT)]
    guidance: Factor
    guidance_rescale: Fraction
    seed: Seed


def scheduler_config(prediction_type: PredictionType, zero_terminal_snr: bool) -> dict[str, object]:
    """Return the configuration of a diffusers scheduler that matches the training."""
    return {
        **SCHEDULE,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def sample_pictures(
    unet: nn.Module, vae: nn.Module, prompts: Prompts, scheduler: dict[str, object], samples: SamplesConfig
) -> np.ndarray:
    """Return a picture per prompt, uint8 [B, H, W, 3]. It depends on the seed and the prompt's number only.

    Each prompt has the chunks that it needs. To attend to the repeated empty prompt is to attend to it once.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(**scheduler), text_encoder=None, text_encoder_2=None,
        tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    height, width = samples.image_size_hw
    pictures = []
    for number in range(len(prompts.embeds)):
        random = torch.Generator().manual_seed(samples.seed + number)
        embeds = prompts.embeds[number : number + 1]
        embeds = embeds[:, find_text(embeds)[0]]
        output = pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=prompts.pooled[number : number + 1],
            negative_prompt_embeds=prompts.empty_embeds.repeat(1, embeds.shape[1] // LENGTH, 1),
            negative_pooled_prompt_embeds=prompts.empty_pooled,
            height=height, width=width, num_inference_steps=samples.steps, guidance_scale=samples.guidance,
            guidance_rescale=samples.guidance_rescale, generator=random, output_type="latent",
            callback_on_step_end=lambda pipeline, step, timestep, tensors: check_stop() or tensors,
        )  # fmt: skip
        pictures.append(decode_latents(vae, output.images)[0].permute(1, 2, 0).cpu().numpy())
    return np.stack(pictures)
