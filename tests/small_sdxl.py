"""What the tests of SDXL share: tiny base models, and pictures of diffusers."""

from functools import reduce
from types import SimpleNamespace

import torch

from engine.recipe.settle import make
from sdxl.files.checkpoints import save_pipeline
from sdxl.files.family import draw_networks
from sdxl.files.tokenizer import build_tokenizer
from sdxl.settle import CHANGES
from utils.config.command_line import Job

V_ZTSNR = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
EPSILON = {"prediction_type": "epsilon", "zero_terminal_snr": False}


def write_base(folder, networks=None, noise=V_ZTSNR):
    """Write SDXL, by default tiny networks, as a folder of diffusers."""
    networks = networks or draw_networks()
    save_pipeline(folder, networks, build_tokenizer(), dtype=torch.float32, zeros_for_empty_prompt=False, **noise)
    return folder


def complete(config):
    """Return a configuration with what files decide, as before a run."""
    start = SimpleNamespace(job=Job("finetune_sdxl", {}, []))
    return reduce(lambda config, change: make(change, config, start), CHANGES[:-1], config)


def paint(pipeline, text, negative="", height=64, guidance=5.0, seed=0):
    """Draw a picture with diffusers, [height, 64, 3] from 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        text, negative_prompt=negative, height=height, width=64, num_inference_steps=3, guidance_scale=guidance,
        guidance_rescale=0.7, generator=torch.Generator().manual_seed(seed), output_type="np",
    ).images[0]  # fmt: skip
