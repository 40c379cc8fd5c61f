"""SDXL in one table, family.yaml: its networks and their files, its latents, and its noise."""

import copy
from typing import NamedTuple

import torch
from torch import nn

from sdxl.config import Sampler
from utils.io.files import Json, Values, read_beside


class NetworkFiles(NamedTuple):
    """A network and its names in files.

    unused: patterns of tensors that carry nothing for SDXL: constants, counters, and what only the training of CLIP or
    of the VAE uses. ComfyUI, Forge, sd-scripts, OneTrainer and old transformers write them.
    """

    prefix: str  # of its tensors in a single file
    file: str  # of its weights in a folder of diffusers, without suffix
    lora: str | None  # kohya's prefix of its layers
    unused: list[str]


class Prediction(NamedTuple):
    """What a U-Net predicts: its names in files, and what samples it. sdxl/step.py has the equations.

    names: ModelSpec's first, then those of other programs. schedule: what the scheduler of a base model has.
    samplers: those of its pictures; the first is that of exports.
    """

    names: list[str]
    schedule: Values
    samplers: dict[Sampler, Values]  # diffusers' class and settings


_TABLE = read_beside(__file__, "family.yaml")
PARTS = {name: NetworkFiles(**row) for name, row in _TABLE["parts"].items()}
PREDICTIONS = {name: Prediction(**row) for name, row in _TABLE["predictions"].items()}
OTHERS = _TABLE["others"]
SAMPLERS = _TABLE["samplers"]
SCHEDULE = _TABLE["schedule"]
SCHEDULER_DEFAULTS = _TABLE["scheduler_defaults"]
UNUSED = _TABLE["unused"]
VAE_SCALING_FACTOR = _TABLE["published"]["vae"]["scaling_factor"]  # single files do not state it
ENCODERS = ("text_encoder", "text_encoder_2")
PREFIXES = {name: part.prefix for name, part in PARTS.items()}
Networks = dict[str, nn.Module]  # by the names of PARTS


def draw_networks(*, tiny: bool = True) -> Networks:
    """Return SDXL with random weights, which are the same in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {part: build_part(part, config) for part, config in list_configs(tiny=tiny).items()}


def list_configs(*, tiny: bool) -> dict[str, Json]:
    """Return the configs of the networks: the published ones, or tiny ones."""
    return copy.deepcopy(_TABLE["tiny" if tiny else "published"])


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
