"""LoRA files in the two layouts that other tools read.

kohya: one .safetensors file for ComfyUI, the web UIs, sd-scripts and diffusers. Layers have the names of SDXL's
original U-Net, with underscores; alpha is a tensor of its own.
diffusers: a folder with pytorch_lora_weights.safetensors. Layers have the names of diffusers' networks; B contains
alpha / rank, because older releases do not read alpha from such a file.

    StableDiffusionXLPipeline.load_lora_weights(FILE or FOLDER)

Source: kohya-ss/sd-scripts:networks/lora.py and library/train_util.py, huggingface/diffusers:loaders/lora_pipeline.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.sdxl.checkpoint_files import NO_HASH, write_hashed
from models.sdxl.lora import LoRA
from models.sdxl.names import rename

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def write_kohya(path: Path, lora: LoRA, dtype: torch.dtype, modelspec: Mapping[str, str]) -> None:
    """Write a LoRA in kohya's layout.

    modelspec: what is known of the model, such as `modelspec.title`, `.resolution`, `.prediction_type`, `.license`;
    architecture, implementation and hash are added.
    """
    config = lora.config
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
        "ss_network_args": json.dumps({"conv_dim": config.rank, "conv_alpha": config.alpha} if config.conv else {}),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }
    _write(path, kohya_tensors(lora, dtype), {**modelspec, **metadata})


def write_diffusers(folder: Path, lora: LoRA, dtype: torch.dtype, modelspec: Mapping[str, str]) -> None:
    """Write a LoRA as a folder of diffusers; modelspec: as in `write_kohya`."""
    metadata = {"format": "pt", "modelspec.implementation": "diffusers"}
    _write(folder / "pytorch_lora_weights.safetensors", diffusers_tensors(lora, dtype), {**modelspec, **metadata})


def kohya_tensors(lora: LoRA, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a LoRA's tensors under kohya's names, with alpha in float32."""
    tensors = {}
    for name, layer in lora.layers().items():
        network, _, path = name.partition(".")
        original = rename("unet", path, to_single=True) if network == "unet" else path
        assert original is not None, name
        stem = f"{_PREFIXES[network]}_{original}".replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = _plain(layer.lora_A.weight, dtype)
        tensors[f"{stem}.lora_up.weight"] = _plain(layer.lora_B.weight, dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(lora.config.alpha)
    return tensors


def diffusers_tensors(lora: LoRA, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a LoRA's tensors under diffusers' names, scaled by alpha / rank."""
    tensors = {}
    for name, layer in lora.layers().items():
        tensors[f"{name}.lora_A.weight"] = _plain(layer.lora_A.weight, dtype)
        tensors[f"{name}.lora_B.weight"] = _plain(layer.scale * layer.lora_B.weight, dtype)
    return tensors


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    modelspec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.hash_sha256": f"0x{NO_HASH}",
        "sshs_model_hash": NO_HASH,
    }
    write_hashed(path, tensors, {**metadata, **modelspec})
