"""Imported once by the server that test processes are forked from (tests/support.py)."""

# ruff: noqa: F401
import gc
import sys
from importlib.util import find_spec

import matplotlib.backends.backend_agg
import onnxruntime
import timm.optim
import torch
import torchvision.transforms.v2
from PIL import Image

import engine.exports.export
import engine.judging.evaluate
import engine.judging.predict
import engine.tasks.classification
import engine.tasks.fcmae
import engine.tasks.tagging
import engine.train
import evaluate
import export
import finetune
import finetune_sdxl
import finetune_vae
import predict
import prepare
import pretrain_fcmae
import sdxl.autoencoder
import sdxl.exports
import sdxl.kind
import sdxl.pictures.painter
import submit.slurm
import train
import utils.record.plots
from tests.in_process import compose

IMPORTED_BY_SCRIPTS = {"diffusers", "transformers", "peft", "open_clip", "ftfy"} & set(sys.modules)
if find_spec("diffusers") is not None:  # five seconds of each run of SDXL
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Image.init()  # imports its plugins
compose("finetune", ["loop.total_steps=1"])  # imports Hydra's parts and fills its parser's caches
gc.collect()
gc.freeze()  # no fork goes through these objects again, which would copy their pages
