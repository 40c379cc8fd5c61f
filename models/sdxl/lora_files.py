"""Read the LoRAs of others: kohya's files (sd-scripts, ComfyUI, the web UIs) and diffusers', and those of our runs.

| layout | a layer's tensors | scale |
|---|---|---|
| kohya | lora_unet_LAYER.lora_down.weight, .lora_up.weight, .alpha | alpha / rank; without alpha, 1 |
| diffusers | unet.LAYER.lora_A.weight, .lora_B.weight, or .lora.down.weight, .lora.up.weight | 1, or alpha / rank by the header's `lora_adapter_metadata` |
| a run of ours | as diffusers | alpha / rank of `task.lora` |

Layers of kohya's files have the names of SDXL's original U-Net or of diffusers', with underscores.
"""  # noqa: E501

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.sdxl.lora import PREFIXES, LoRA, LoRAConfig, find_layers, kohya_name
from models.sdxl.networks import unused_layer
from utils.errors import UserError
from utils.io.files import readable
from utils.io.weights import read_header, read_weights
from utils.record.logging import get_logger

log = get_logger(__name__)

_ALL = LoRAConfig(rank=1, alpha=1.0, targets=["*"], conv=True, text_encoders=True)
_ENDINGS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha", ".lora_A.weight": "down",
    ".lora_B.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
}  # fmt: skip
_SHOWN = 3  # layers in a message


class Matrices(NamedTuple):
    """The update of a layer: scale x up x down."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    scale: float


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, Matrices]:
    """Return the updates in a file by the layers' names in `LoRA`. networks: SDXL's; only their shapes are used.

    Raises UserError if it is no LoRA, one of another base model or kind, or damaged. Updates of the first text
    encoder's last layer, whose output SDXL does not use, are ignored.
    """
    texts, (tensors, metadata) = read_header(path)[1], read_weights(path)
    layers, names = find_layers(networks, _ALL), dict[str, str]()
    for name in layers:
        network, _, inside = name.partition(".")
        names |= dict.fromkeys([_flat(name), _flat(f"{PREFIXES[network]}_{inside}"), kohya_name(name)], name)
    unused, found = _flat(unused_layer(networks["text_encoder"])), dict[str, dict[str, Tensor]]()
    for full, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if full.endswith(ending)), "")
        stem = _flat(full.removesuffix(ending))
        if stem.startswith(("lora_te1_", "text_encoder_text_model_")) and unused in stem:
            continue
        if not ending or stem not in names:
            raise _misfit(path, texts, f"its tensor {full[:200]} belongs to no linear layer or convolution of SDXL")
        found.setdefault(names[stem], {})[_ENDINGS[ending]] = tensor.float()
    updates = {}
    with readable(path, "LoRA"):
        alphas = _stated_alphas(texts, metadata)
        for name, parts in found.items():
            down, up, weight = parts["down"], parts["up"], layers[name].weight
            rank = len(down)
            if (down[0].numel(), tuple(up.flatten(1).shape)) != (weight[0].numel(), (len(weight), rank)):
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise _misfit(path, texts, f"{name} has {shapes}, but SDXL's layer is {tuple(weight.shape)}")
            alpha = parts.get("alpha", alphas.get(name.partition(".")[0], rank))
            updates[name] = Matrices(down, up, float(alpha) / rank)
    if not updates:
        raise _misfit(path, texts, "it has no tensors of one")
    return updates


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _misfit(path: Path, texts: Mapping[str, str], reason: str) -> UserError:
    stated = texts.get("ss_base_model_version") or texts.get("modelspec.architecture")
    base = f" Its base model is {stated[:200]!r}." if stated else ""
    return UserError(f"{path} is no LoRA of SDXL's linear layers and convolutions: {reason}.{base} Name another file")


def _stated_alphas(texts: Mapping[str, str], metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the alpha of each network where the layers have none of their own."""
    if isinstance(task := metadata.get("task"), dict) and task.get("lora") is not None:
        return dict.fromkeys(PREFIXES, LoRAConfig.model_validate(task["lora"]).alpha)
    stated = dict(json.loads(texts.get("lora_adapter_metadata", "{}")))
    for option in ("alpha_pattern", "use_rslora", "use_dora"):
        if any(stated.get(f"{network}.{option}") for network in PREFIXES):
            raise ValueError(f"lora_adapter_metadata has {option}, which is not supported")
    return {network: float(stated[key]) for network in PREFIXES if (key := f"{network}.lora_alpha") in stated}


@torch.no_grad()
def continue_lora(lora: LoRA, path: Path, networks: Mapping[str, nn.Module]) -> None:
    """Load a file into a LoRA; another alpha scales the matrices, so that the update stays the same.

    Raises UserError (`task.lora`) if the rank or the layers differ.
    """
    given, own = read_lora(path, networks), lora.layers()
    ranks = sorted({len(matrices.down) for matrices in given.values()})
    if ranks != [lora.config.rank]:
        listed = " and ".join(map(str, ranks))
        advice = f"set task.lora.rank={listed}" if len(ranks) == 1 else "a run has one rank for all layers"
        raise UserError(f"task.lora.rank: {lora.config.rank}, but {path} has rank {listed}; {advice}")
    if given.keys() != own.keys():
        extra, missing = ([name for name in a if name not in b] for a, b in ((given, own), (own, given)))
        listed = "; ".join(
            f"{len(names)} only in {where}, such as {', '.join(names[:_SHOWN])}"
            for where, names in (("the file", extra), ("this run", missing)) if names
        )  # fmt: skip
        raise UserError(
            f"task.lora.targets: they choose {len(own)} layers, but {path} has {len(given)} ({listed}); set targets, "
            "and task.lora.conv and text_encoders, that choose its layers"
        )
    for name, layer in own.items():
        matrices = given[name]
        layer.lora_A.weight.copy_(matrices.down.view_as(layer.lora_A.weight))
        layer.lora_B.weight.copy_((matrices.scale / layer.scale * matrices.up).view_as(layer.lora_B.weight))
    scales = sorted({matrices.scale for matrices in given.values()})
    log.info("init_from: %s, %d layers of rank %d, scaled by %s", path, len(given), ranks[0], scales)


@torch.no_grad()
def merge_lora(path: Path, strength: float, networks: Mapping[str, nn.Module]) -> None:
    """Add a file's updates, times a strength, to the weights of SDXL's networks."""
    layers = find_layers(networks, _ALL)
    for name, (down, up, scale) in read_lora(path, networks).items():
        weight = layers[name].weight
        weight += (strength * scale * up.flatten(1) @ down.flatten(1)).view_as(weight)
