"""The formats of task=diffusion: files that ComfyUI, the web UIs, sd-scripts and diffusers load.

A LoRA is written alone (kohya, lora_diffusers) or merged into the base model (single_file, diffusers).
"""

from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.exports.weights import Weights
from engine.task import Task
from models.export.model_card import licence_entry
from models.export.onnx_file import OnnxConfig
from models.sdxl import checkpoint_files, lora
from models.sdxl.networks import SDXLNetworks, load_networks, open_networks
from models.sdxl.tokenizer import build_tokenizer
from utils.errors import UserError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_LORA_FILE, _SINGLE_FILE = "lora.safetensors", "model.safetensors"
_MERGE_TOLERANCE = 1e-3  # of the largest output, in float32


def _lora(weights: Weights, name: str) -> Task:
    if weights.setup.task.lora is None:
        raise UserError(f"format: {name} is of a LoRA, and this run trained the whole U-Net; set format=single_file")
    return weights.task


def _facts(weights: Weights) -> dict[str, str]:
    """Return what ModelSpec calls title, date and so on."""
    height, width = weights.setup.task.samples.image_size_hw
    return {
        "title": weights.path.stem,
        "date": date.today().isoformat(),
        "resolution": f"{width}x{height}",
        **licence_entry("license", weights.metadata),
    }


def write_kohya(weights: Weights, folder: Path, config: OnnxConfig) -> dict[str, Any]:
    """Write a LoRA for ComfyUI, the web UIs and sd-scripts."""
    task, predicts = _lora(weights, "kohya"), weights.setup.task.noise.prediction_type
    facts = {**_facts(weights), "prediction_type": "v" if predicts == "v_prediction" else predicts}
    metadata = {f"modelspec.{name}": text for name, text in facts.items()}
    lora.write_kohya(folder / _LORA_FILE, task.adapter, _DTYPES[config.precision], metadata)
    return {"file": _LORA_FILE}


def write_lora_diffusers(weights: Weights, folder: Path, config: OnnxConfig) -> dict[str, Any]:
    """Write a LoRA for diffusers."""
    lora.write_diffusers(folder, _lora(weights, "lora_diffusers").adapter, _DTYPES[config.precision], {})
    return {"file": "pytorch_lora_weights.safetensors"}


def whole_networks(weights: Weights) -> tuple[SDXLNetworks, dict[str, Any]]:
    """Return all networks in float32, with what was trained in them, and a report of a LoRA's merge."""
    task, setup = weights.task, weights.setup
    networks = open_networks(setup.model)
    if setup.task.lora is None:
        for name in task.roles.trained:
            setattr(networks, name, task.get_submodule(name))
        return networks, {}
    parts = networks.parts()
    task.adapter.attach(parts)
    before = _run_unet(networks.unet)
    task.adapter.merge(parts)
    after = _run_unet(networks.unet)
    difference = float((after - before).abs().max() / before.abs().max())
    if difference > _MERGE_TOLERANCE:
        raise UserError(f"format: the merged U-Net differs by {difference:.1e} from the LoRA beside it; report this")
    return networks, {"merge_max_rel_diff": difference}


@torch.no_grad()
def _run_unet(unet: nn.Module) -> torch.Tensor:
    config, random = unet.config, torch.Generator().manual_seed(0)
    noisy, texts = (
        torch.randn(1, *shape, generator=random) for shape in ((4, 16, 16), (77, config.cross_attention_dim))
    )
    pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    return unet(noisy, 500, encoder_hidden_states=texts, added_cond_kwargs=added).sample


def write_single_file(weights: Weights, folder: Path, config: OnnxConfig) -> dict[str, Any]:
    """Write the whole model as one checkpoint, and read it back."""
    networks, report = whole_networks(weights)
    noise, path, dtype = weights.setup.task.noise, folder / _SINGLE_FILE, _DTYPES[config.precision]
    checkpoint_files.write_single_file(
        path, networks, prediction_type=noise.prediction_type, zero_terminal_snr=noise.zero_terminal_snr, dtype=dtype,
        metadata=_facts(weights),
    )  # fmt: skip
    read = load_networks(path).states()
    for part, state in networks.states().items():
        for name, tensor in state.items():
            kept = tensor.to(dtype).float()
            assert torch.equal(read[part][name], kept) or part == "vae", (part, name)
    return {"file": _SINGLE_FILE, **report}


def write_diffusers(weights: Weights, folder: Path, config: OnnxConfig) -> dict[str, Any]:
    """Write the whole model as a folder of diffusers."""
    networks, report = whole_networks(weights)
    task = weights.setup.task
    checkpoint_files.write_diffusers(
        folder, networks, build_tokenizer(), prediction_type=task.noise.prediction_type,
        zero_terminal_snr=task.noise.zero_terminal_snr, dtype=_DTYPES[config.precision],
        zeros_for_empty_prompt=task.captions.dropout_to == "zeros",
    )  # fmt: skip
    return {"file": "model_index.json", **report}


SDXL_FORMATS = {
    "kohya": write_kohya,
    "lora_diffusers": write_lora_diffusers,
    "single_file": write_single_file,
    "diffusers": write_diffusers,
}
