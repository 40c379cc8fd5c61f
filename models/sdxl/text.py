"""SDXL's two text encoders: what the U-Net's attention reads, and the pooled text that is added to its timestep."""

import torch
from torch import Tensor, nn

from models.sdxl.tokenizer import pad_second


def encode_text(text_encoder: nn.Module, text_encoder_2: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode the ids of `tokenize`, int64 [B, chunks, 77].

    Returns prompt_embeds [B, 77 * chunks, 768 + 1280], the penultimate layers without the final norm, chunk after
    chunk; and pooled_prompt_embeds [B, 1280], the second encoder's EOT of the first chunk through its projection.
    Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1.
    """
    first = text_encoder(ids.flatten(0, 1), output_hidden_states=True)
    second = text_encoder_2(pad_second(ids).flatten(0, 1), output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return embeds.reshape(len(ids), -1, embeds.shape[-1]), second.text_embeds[:: ids.shape[1]]


def unused_layer(text_encoder: nn.Module) -> str:
    """Return what is in the names of the first encoder's last layer, behind the one that is read: `.layers.11.`."""
    return f".layers.{text_encoder.config.num_hidden_layers - 1}."


def freeze_unused(text_encoder: nn.Module) -> None:
    """Turn off the gradients of the first encoder's last layer and final norm, which do not reach the U-Net."""
    unused = unused_layer(text_encoder)
    for name, parameter in text_encoder.named_parameters():
        if unused in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


def zero_dropped(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Return both embeddings with zeros for the samples of `dropped`, bool [B].

    Source: huggingface/diffusers, StableDiffusionXLPipeline with force_zeros_for_empty_prompt.
    """
    return prompt_embeds.masked_fill(dropped[:, None, None], 0), pooled_prompt_embeds.masked_fill(dropped[:, None], 0)
