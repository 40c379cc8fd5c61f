"""The exports of task=diffusion: files that ComfyUI, the web UIs, sd-scripts and diffusers load.

A LoRA is written alone (kohya, lora_diffusers) or merged into the base model (single_file, diffusers).
"""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.task import Task
from engine.tasks.kind import Export, ExportSettings, Opened
from models.export.model_card import licence_entry
from models.sdxl import checkpoint_files, lora_files
from models.sdxl.networks import SDXLNetworks, load_networks, open_networks
from models.sdxl.tokenizer import build_tokenizer
from utils.errors import UserError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_LORA_FILE, _SINGLE_FILE = "lora.safetensors", "model.safetensors"
_MERGE_TOLERANCE = 1e-3  # of the largest output, in float32


def _dtype(settings: ExportSettings) -> torch.dtype:
    if settings.precision not in _DTYPES:
        raise UserError(f"precision: {settings.precision} is for ONNX; set fp32 or fp16")
    return _DTYPES[settings.precision]


def _lora(opened: Opened, name: str) -> Task:
    task = opened.rebuilt.task
    if opened.rebuilt.setup.task.lora is None:
        raise UserError(f"format: {name} is of a LoRA, and this run trained the whole U-Net; set format=single_file")
    return task


def _facts(opened: Opened) -> dict[str, str]:
    """Return what ModelSpec calls title, date and so on."""
    height, width = opened.rebuilt.setup.task.samples.image_size_hw
    return {
        "title": Path(opened.rebuilt.weights).stem,
        "date": date.today().isoformat(),
        "resolution": f"{width}x{height}",
        **licence_entry("license", opened.metadata),
    }


def _write_kohya(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    task, noise = _lora(opened, "kohya"), opened.rebuilt.setup.task.noise
    kind = "v" if noise.prediction_type == "v_prediction" else noise.prediction_type
    facts = {f"modelspec.{name}": text for name, text in {**_facts(opened), "prediction_type": kind}.items()}
    lora_files.write_kohya(folder / _LORA_FILE, task.adapter, _dtype(settings), facts)
    return {"file": _LORA_FILE}


def _write_lora_diffusers(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    task = _lora(opened, "lora_diffusers")
    lora_files.write_diffusers(folder, task.adapter, _dtype(settings), {})
    return {"file": "pytorch_lora_weights.safetensors"}


def whole_networks(opened: Opened) -> tuple[SDXLNetworks, dict[str, Any]]:
    """Return all networks in float32, with what was trained in them, and a report of a LoRA's merge."""
    task, setup = opened.rebuilt.task, opened.rebuilt.setup
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


def _write_single_file(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    networks, report = whole_networks(opened)
    noise, path, dtype = opened.rebuilt.setup.task.noise, folder / _SINGLE_FILE, _dtype(settings)
    checkpoint_files.write_single_file(
        path, networks, prediction_type=noise.prediction_type, zero_terminal_snr=noise.zero_terminal_snr, dtype=dtype,
        metadata=_facts(opened),
    )  # fmt: skip
    read = load_networks(path, "output").states()
    for part, state in networks.states().items():
        for name, tensor in state.items():
            kept = tensor.to(dtype).float()
            assert torch.equal(read[part][name], kept) or part == "vae", (part, name)
    return {"file": _SINGLE_FILE, **report}


def _write_diffusers(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    networks, report = whole_networks(opened)
    task = opened.rebuilt.setup.task
    checkpoint_files.write_diffusers(
        folder, networks, build_tokenizer(), prediction_type=task.noise.prediction_type,
        zero_terminal_snr=task.noise.zero_terminal_snr, dtype=_dtype(settings),
        zeros_for_empty_prompt=task.captions.dropout_to == "zeros",
    )  # fmt: skip
    return {"file": "model_index.json", **report}


def _export(file: str, write: Any) -> Export:
    return Export(lambda settings: file, write, frozenset({"precision"}))


DIFFUSION_EXPORTS: Mapping[str, Export] = {
    "kohya": _export(_LORA_FILE, _write_kohya),
    "lora_diffusers": _export("pytorch_lora_weights.safetensors", _write_lora_diffusers),
    "single_file": _export(_SINGLE_FILE, _write_single_file),
    "diffusers": _export("model_index.json", _write_diffusers),
}
