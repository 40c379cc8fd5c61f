"""Generate pictures with diffusers' pipeline: trailing timesteps or Euler's method, and rescaled guidance.

Source: Lin et al. 2023 (arXiv 2305.08891), sections 3.3 and 3.4.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sdxl.config import PredictionType, Prompt
from sdxl.files.family import PREDICTIONS
from sdxl.files.tokenizer import count_chunks
from sdxl.step import decode_latents, encode_captions
from utils.contracts import State
from utils.errors import UserError
from utils.ranks.signals import check_stop


class EncodedPrompt(NamedTuple):
    """The inputs of diffusers' pipeline: embeds [1, L, D] and pooled embeds [1, P] of a prompt and its negative."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    negative_pooled_prompt_embeds: Tensor


def _stop_if_asked(pipeline: Any, step: int, timestep: Any, tensors: State) -> State:
    check_stop()
    return tensors


def scheduler_config(
    prediction_type: PredictionType, zero_terminal_snr: bool, shift: float = 1.0, sampler: str = "auto"
) -> dict[str, object]:
    """Return the configuration of a diffusers scheduler that matches the training. shift: of the times of flow.

    Raises UserError for a sampler that a flow has not.
    """
    samplers = PREDICTIONS[prediction_type].samplers
    name = next(iter(samplers)) if sampler == "auto" else sampler
    if name not in samplers:
        raise UserError(f"{name} does not draw {prediction_type}; set auto, {', '.join(samplers)}")
    config = samplers[name]
    if prediction_type == "flow":
        return {**config, "flow_shift": shift}
    return {**config, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal_snr}


@torch.no_grad()
def encode_prompt(
    encoders: Sequence[nn.Module], prompt: Prompt, *, zeros_for_empty_prompt: bool, emphasis: bool
) -> EncodedPrompt:
    """Encode a prompt and its negative, with as many chunks as they need, repeated to the same length.

    emphasis: as for `tokenize`.
    To attend to a repeated text is to attend to it once. Source: comfyanonymous/ComfyUI:comfy/conds.py, CONDCrossAttn.
    """

    def encode(text: str) -> tuple[Tensor, Tensor]:
        return encode_captions(encoders, [text], count_chunks(text, emphasis=emphasis), emphasis=emphasis)

    embeds, pooled = encode(prompt.text)
    negative, negative_pooled = encode(prompt.negative)
    if zeros_for_empty_prompt and not prompt.negative:
        negative = torch.zeros_like(negative)
        negative_pooled = torch.zeros_like(negative_pooled)
    length = math.lcm(embeds.shape[1], negative.shape[1])
    embeds, negative = (each.repeat(1, length // each.shape[1], 1) for each in (embeds, negative))
    return EncodedPrompt(embeds, pooled, negative, negative_pooled)


def sample_pictures(
    unet: nn.Module,
    vae: nn.Module,
    scheduler: dict[str, object],
    prompts: Sequence[Prompt],
    encoded: Sequence[EncodedPrompt],
) -> Iterator[np.ndarray]:
    """Yield a picture per complete prompt, uint8 [H, W, 3]. It depends on its prompt only."""
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    for prompt, tensors in zip(prompts, encoded):
        height, width = prompt.image_size_hw
        embeds = {name: tensor.to(vae.device, unet.dtype) for name, tensor in tensors._asdict().items()}
        generator = torch.Generator().manual_seed(prompt.seed)
        output = pipeline(
            **embeds, height=height, width=width, num_inference_steps=prompt.steps, guidance_scale=prompt.guidance,
            guidance_rescale=prompt.guidance_rescale, output_type="latent", generator=generator,
            callback_on_step_end=_stop_if_asked,
        )  # fmt: skip
        yield decode_latents(vae, output.images)[0].permute(1, 2, 0).cpu().numpy()
