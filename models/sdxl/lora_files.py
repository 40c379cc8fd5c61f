"""Read LoRAs: kohya's files (sd-scripts, ComfyUI, the web UIs), diffusers', and those of our runs.

Layers of kohya's files have the names of SDXL's original U-Net or of diffusers', with underscores.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.sdxl.family import ENCODERS, PARTS
from models.sdxl.lora import LoRAConfig, add_updates, find_layers, kohya_name
from models.sdxl.networks import unused_layer
from utils.errors import UserError
from utils.io.files import readable
from utils.io.weights import read_header, read_weights

_ADAPTED = ("unet", *ENCODERS)
_ENDINGS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha", ".lora_A.weight": "down",
    ".lora_B.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
}  # fmt: skip


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return the updates in a file by the layers' names in `LoRA`: down, up and scale, in the shapes of a `LoRALayer`.

    networks: SDXL's; only their shapes are used. Raises UserError for a LoRA of another base model or kind, or other
    files. Updates of the first text encoder's last layer, whose output SDXL does not use, are ignored.
    """
    texts, (tensors, metadata) = read_header(path)[1], read_weights(path)
    layers, names = find_layers(networks), dict[str, str]()
    for name in layers:
        network, _, inside = name.partition(".")
        names |= dict.fromkeys([_flat(name), _flat(f"{PARTS[network].lora}_{inside}"), kohya_name(name)], name)
    unused, found, updates = _flat(unused_layer(networks["text_encoder"])), dict[str, dict[str, Tensor]](), {}
    stated = texts.get("ss_base_model_version") or texts.get("modelspec.architecture") or "not stated"
    other = f"{path} is no LoRA of SDXL's linear layers and convolutions (base model: {stated[:99]}): "
    for full, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if full.endswith(ending)), "")
        stem = _flat(full.removesuffix(ending))
        if stem.startswith(("lora_te1_", "text_encoder_text_model_")) and unused in stem:
            continue
        if not ending or stem not in names:
            raise UserError(f"{other}its tensor {full[:200]} belongs to no such layer; name another file")
        found.setdefault(names[stem], {})[_ENDINGS[ending]] = tensor.float()
    with readable(path, "LoRA"):
        alphas = _stated_alphas(texts, metadata)
        for name, parts in found.items():
            down, up, shape = parts["down"], parts["up"], layers[name].weight.shape
            rank = len(down)
            if (down[0].numel(), tuple(up.flatten(1).shape)) != (shape[1:].numel(), (shape[0], rank)):
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise UserError(f"{other}{name} has {shapes}, but SDXL's layer is {tuple(shape)}; name another file")
            alpha = float(parts.get("alpha", alphas.get(name.partition(".")[0], rank)))
            updates[name] = down.view(rank, *shape[1:]), up.view(shape[0], rank, *[1] * len(shape[2:])), alpha / rank
    return updates


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _stated_alphas(texts: Mapping[str, str], metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the alpha of each network for layers without one: of a run of ours, or of a newer file of diffusers."""
    if isinstance(task := metadata.get("task"), dict) and task.get("lora") is not None:
        return dict.fromkeys(_ADAPTED, LoRAConfig.model_validate(task["lora"]).alpha)
    stated = json.loads(texts.get("lora_adapter_metadata", "{}"))
    for option in ("alpha_pattern", "use_rslora", "use_dora"):
        if any(stated.get(f"{network}.{option}") for network in _ADAPTED):
            raise ValueError(f"lora_adapter_metadata has {option}, which is not supported")
    return {network: float(stated[key]) for network in _ADAPTED if (key := f"{network}.lora_alpha") in stated}


@torch.no_grad()
def merge_lora(path: Path, strength: float, networks: Mapping[str, nn.Module]) -> None:
    """Add a file's updates, times a strength, to the weights of SDXL's networks."""
    updates = read_lora(path, networks).items()
    matrices = ((name, strength * scale * up.flatten(1) @ down.flatten(1)) for name, (down, up, scale) in updates)
    add_updates(networks, matrices)
