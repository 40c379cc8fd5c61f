"""Read LoRAs of all kinds: files of kohya and LyCORIS (sd-scripts, ComfyUI, the web UIs), diffusers', and our runs'.

Layers of kohya's files have the names of SDXL's original U-Net or of diffusers', with underscores.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.sdxl.changes import Change
from models.sdxl.family import PARTS
from models.sdxl.lora import ADAPTED, LoRAConfig, add_changes, find_layers, kohya_name
from models.sdxl.networks import unused_layer
from utils.errors import UserError
from utils.io.files import Values, readable
from utils.io.weights import read_header, read_weights

_ENDINGS = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight"), "lora_A.weight"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight"), "lora_B.weight"),
    **{f".{name}": name for name in ("alpha", "dora_scale", "lokr_w1", "lokr_w2")},
    **{f".{name}_{end}": f"{name}_{end}" for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for end in "ab"},
}


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, Change]:
    """Return the changes in a file by the layers' names in `LoRA`, in the shapes of a `LoRALayer`.

    networks: SDXL's; only their shapes are used. Raises UserError for a LoRA of another base model or kind, or other
    files. Changes of the first text encoder's last layer, whose output SDXL does not use, are ignored.
    """
    texts = read_header(path)[1]
    tensors, metadata = read_weights(path)
    stated = texts.get("ss_base_model_version") or texts.get("modelspec.architecture") or "not stated"
    other = f"{path} is no LoRA of SDXL's linear layers and convolutions (base model: {stated[:99]}): "
    layers = find_layers(networks)
    names = {}
    for name in layers:
        network, _, inside = name.partition(".")
        names |= dict.fromkeys([_flat(name), _flat(f"{PARTS[network].lora}_{inside}"), kohya_name(name)], name)
    unused = _flat(unused_layer(networks["text_encoder"]))
    found = {}
    for full, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if full.endswith(ending)), "")
        stem = _flat(full.removesuffix(ending))
        if stem.startswith(("lora_te1_", "text_encoder_text_model_")) and unused in stem:
            continue
        if not ending or stem not in names:
            raise UserError(f"{other}its tensor {full[:200]} belongs to no such layer; name another file")
        found.setdefault(names[stem], {})[_ENDINGS[ending]] = tensor.float()
    changes = {}
    with readable(path, "LoRA"):
        alphas = _stated_alphas(texts, metadata)
        for name, parts in found.items():
            weight = layers[name].weight
            alpha = parts.pop("alpha", alphas.get(name.partition(".")[0]))
            changes[name] = Change(parts, None if alpha is None else float(alpha))
            if not _fits(changes[name], weight.to("meta")):
                shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items())
                raise UserError(f"{other}{name} has {shapes}, but SDXL's layer is {tuple(weight.shape)}; name another")
            if "lora_A.weight" in parts:
                parts["lora_A.weight"] = parts["lora_A.weight"].view(-1, *weight.shape[1:])
                parts["lora_B.weight"] = parts["lora_B.weight"].view(len(weight), -1, *[1] * (weight.ndim - 2))
    return changes


def _fits(change: Change, weight: Tensor) -> bool:
    """Return whether a change is for a layer of this weight, on the meta device."""
    change = Change({name: tensor.to("meta") for name, tensor in change.tensors.items()}, None)
    try:
        return change.matrix().shape == weight.flatten(1).shape == change.on(weight).flatten(1).shape
    except (RuntimeError, IndexError):  # of shapes
        return False


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _stated_alphas(texts: Mapping[str, str], metadata: Values) -> dict[str, float]:
    """Return the alpha of each network for layers without one: of a run of ours, or of a newer file of diffusers."""
    if isinstance(task := metadata.get("task"), dict) and task.get("lora") is not None:
        return dict.fromkeys(ADAPTED, LoRAConfig.model_validate(task["lora"]).alpha)
    stated = json.loads(texts.get("lora_adapter_metadata", "{}"))
    for option in ("alpha_pattern", "use_rslora", "use_dora"):
        if any(stated.get(f"{network}.{option}") for network in ADAPTED):
            raise ValueError(f"lora_adapter_metadata has {option}, which is not supported")
    return {network: float(stated[key]) for network in ADAPTED if (key := f"{network}.lora_alpha") in stated}


@torch.no_grad()
def merge_lora(path: Path, strength: float, networks: Mapping[str, nn.Module]) -> None:
    """Add a file's changes, times a strength, to the weights of SDXL's networks."""
    add_changes(networks, read_lora(path, networks), strength)
