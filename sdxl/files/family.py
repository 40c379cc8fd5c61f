"""SDXL in one table: its networks and their files, its latents, and its noise."""

from typing import NamedTuple

import torch
from torch import nn

from sdxl.config import TIMESTEP_COUNT, Sampler
from utils.io.files import Json, Values


class NetworkFiles(NamedTuple):
    """A network and its names in files.

    unused: patterns of tensors that carry nothing for SDXL: constants, counters, and what only the training of CLIP or
    of the VAE uses. ComfyUI, Forge, sd-scripts, OneTrainer and old transformers write them.
    """

    prefix: str  # of its tensors in a single file
    file: str  # of its weights in a folder of diffusers, without suffix
    lora: str | None  # kohya's prefix of its layers
    unused: tuple[str, ...]


_DIFFUSERS = "diffusion_pytorch_model"
_TRANSFORMERS = "model"
_CLIP = ("*position_ids", "*logit_scale")
PARTS = {
    "unet": NetworkFiles("model.diffusion_model.", _DIFFUSERS, "lora_unet", ()),
    "vae": NetworkFiles("first_stage_model.", _DIFFUSERS, None, ("loss.*", "model_ema.*")),
    "text_encoder": NetworkFiles(
        "conditioner.embedders.0.transformer.", _TRANSFORMERS, "lora_te1",
        (*_CLIP, "*text_projection", "*text_projection.weight"),
    ),
    "text_encoder_2": NetworkFiles("conditioner.embedders.1.model.", _TRANSFORMERS, "lora_te2", (*_CLIP, "attn_mask")),
}  # fmt: skip
ENCODERS = ("text_encoder", "text_encoder_2")
PREFIXES = {name: part.prefix for name, part in PARTS.items()}
Networks = dict[str, nn.Module]  # by the names of PARTS
UNUSED = (  # in a single file, outside of its networks
    "conditioner.embedders.?.logit_scale", "conditioner.embedders.0.text_projection*", "v_pred", "ztsnr",
    "model_ema.decay", "model_ema.num_updates", "denoiser.*", "betas", "*alphas_cumprod*", "posterior_*", "logvar",
    "global_step",
)  # fmt: skip

VAE_SCALING_FACTOR = 0.13025  # single files do not state it
SCHEDULE = {  # Stable Diffusion's, as diffusers' schedulers name it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",  # the square roots of beta are evenly spaced
    "num_train_timesteps": TIMESTEP_COUNT,
}


class Prediction(NamedTuple):
    """What a U-Net predicts: its names in files, and what samples it. sdxl/step.py has the equations.

    names: ModelSpec's first, then those of other programs. schedule: what the scheduler of a base model has.
    samplers: those of its pictures; the first is that of exports.
    """

    names: tuple[str, ...]
    schedule: Values
    samplers: dict[Sampler, Values]  # diffusers' class and settings


_TABLE = {**SCHEDULE, "trained_betas": None, "use_flow_sigmas": False}
_SPACED = {**SCHEDULE, "timestep_spacing": "trailing"}
_DPM = "DPMSolverMultistepScheduler"
_SAMPLED = {
    "ddim": {"_class_name": "DDIMScheduler", **_SPACED, "clip_sample": False, "set_alpha_to_one": False},
    "euler": {"_class_name": "EulerDiscreteScheduler", **_SPACED},
    "euler_a": {"_class_name": "EulerAncestralDiscreteScheduler", **_SPACED},
    "dpmpp_2m": {"_class_name": _DPM, **_SPACED},
}
_FLOW = {"num_train_timesteps": TIMESTEP_COUNT, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Its first order is Euler's method. diffusers' pipeline of SDXL does not run with FlowMatchEulerDiscreteScheduler.
_FLOW_SAMPLED = {
    "euler": {"_class_name": _DPM, **_FLOW, "solver_order": 1},
    "dpmpp_2m": {"_class_name": _DPM, **_FLOW},
}
PREDICTIONS = {  # by the names of `task.noise.prediction_type`
    "epsilon": Prediction(("epsilon", "eps"), _TABLE, _SAMPLED),
    "v_prediction": Prediction(("v", "v_prediction"), _TABLE, _SAMPLED),
    "flow": Prediction(("flow", "flow_prediction", "flow_matching", "rectified_flow"), _FLOW, _FLOW_SAMPLED),
}
SAMPLERS = {  # the web UIs' names of classes
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    _DPM: "DPM++ 2M",
}


def draw_networks(*, tiny: bool = True) -> Networks:
    """Return SDXL with random weights, which are the same in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {part: build_part(part, config) for part, config in list_configs(tiny=tiny).items()}


class _Sizes(NamedTuple):
    unet: list[int]  # widths of the levels
    blocks: list[int]  # transformer blocks of each level
    number: int  # width of an embedded number
    vae: list[int]
    text: tuple[int, int]  # widths of the encoders
    layers: tuple[int, int]
    inner: int  # width within a text layer, as a multiple of its own


_PUBLISHED = _Sizes([320, 640, 1280], [1, 2, 10], 256, [128, 256, 512, 512], (768, 1280), (12, 32), 4)
_TINY = _Sizes([16, 32, 32], [1, 1, 2], 16, [16, 16, 32, 32], (32, 48), (2, 2), 2)  # 0.8 million in the U-Net
_UNET = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": VAE_SCALING_FACTOR,
    "force_upcast": True,  # its maps exceed float16
}
_TEXT = {"vocab_size": 49_408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
_ACTIVATIONS = ("quick_gelu", "gelu")


def list_configs(*, tiny: bool) -> dict[str, Json]:
    """Return the configs of the networks: the published ones, or tiny ones."""
    sizes = _TINY if tiny else _PUBLISHED
    unet = {
        **_UNET,
        "block_out_channels": sizes.unet,
        "transformer_layers_per_block": sizes.blocks,
        "attention_head_dim": list(map(_heads, sizes.unet)),  # diffusers' name for the number of heads
        "norm_num_groups": min(32, sizes.unet[0] // 4),
    }
    unet |= {
        "cross_attention_dim": sum(sizes.text),
        "addition_time_embed_dim": sizes.number,
        "projection_class_embeddings_input_dim": 6 * sizes.number + sizes.text[1],
    }
    vae = {**_VAE, "block_out_channels": sizes.vae, "norm_num_groups": min(32, sizes.vae[0] // 4)}
    configs = {"unet": unet, "vae": vae}
    for part, width, layers, activation in zip(ENCODERS, sizes.text, sizes.layers, _ACTIVATIONS):
        configs[part] = {
            **_TEXT,
            "hidden_size": width,
            "intermediate_size": sizes.inner * width,
            "projection_dim": width,
            "num_hidden_layers": layers,
            "num_attention_heads": _heads(width),
            "hidden_act": activation,
        }
    return configs


def _heads(width: int) -> int:
    """Return the number of attention heads, which are 64 wide; a network narrower than 128 has one."""
    return max(1, width // 64)


def build_part(part: str, config: Values) -> nn.Module:
    """Return a network with random weights, in eval mode. config: all that determines its tensors and their meaning."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if part == "unet":
        return UNet2DConditionModel(sample_size=128, **config).eval()
    if part == "vae":
        return AutoencoderKL(sample_size=1024, **config).eval()
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    # Ids of the published config. With eos_token_id 2, transformers uses the largest id as the end of the text.
    return kind(CLIPTextConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, **config)).eval()
