"""Read LoRAs of all kinds: files of kohya and LyCORIS (sd-scripts, ComfyUI, the web UIs), diffusers', and our runs'.

Layers of kohya's files have the names of SDXL's original U-Net or of diffusers', with underscores.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from models.interop.metadata import dict_of
from sdxl.config import LoRAConfig
from sdxl.files.family import PARTS
from sdxl.lora.changes import LayerChange
from sdxl.lora.lora import find_layers, kohya_name
from sdxl.networks import unused_layer
from utils.contracts import State
from utils.errors import UserError
from utils.io.files import Values, readable
from utils.io.weights import read_header, read_weights

_ENDINGS = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight"), "lora_A.weight"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight"), "lora_B.weight"),
    **{f".{name}": name for name in ("alpha", "dora_scale", "lokr_w1", "lokr_w2")},
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "dora_scale"),  # PEFT's
    **{f".{name}_{end}": f"{name}_{end}" for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2") for end in "ab"},
}


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, LayerChange]:
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
    tensors_of = {}
    for full, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if full.endswith(ending)), "")
        stem = _flat(full.removesuffix(ending))
        if stem.startswith(("lora_te1_", "text_encoder_text_model_")) and unused in stem:
            continue
        if not ending or stem not in names:
            raise UserError(
                f"{other}its tensor {full[:200]} is of another layer, or of a kind that is not read "
                "(norms, Tucker, OFT, full matrices, ...); name another file"
            )
        tensors_of.setdefault(names[stem], {})[_ENDINGS[ending]] = tensor.float()
    changes = {}
    with readable(path, "LoRA"):
        own = _own_config(metadata)
        stated = json.loads(texts.get("lora_adapter_metadata", "{}"))
        for key, value in stated.items():
            if value and key.endswith(("alpha_pattern", "use_rslora")):
                raise ValueError(f"lora_adapter_metadata has {key}, which is not supported")
        for name, parts in tensors_of.items():
            weight = layers[name].weight
            alpha = parts.pop("alpha", None)
            if "dora_scale" in parts and parts["dora_scale"].ndim == 1:
                parts["dora_scale"] = parts["dora_scale"].view(-1, *[1] * (weight.ndim - 1))
            change = LayerChange(parts, 1.0)
            if alpha is None:
                given = stated.get(f"{name.partition('.')[0]}.lora_alpha", change.rank)
                alpha = own.layers.get(name, own).alpha if own else given
            changes[name] = change._replace(alpha=float(alpha))
            if not _fits(change, weight.to("meta")):
                shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items())
                raise UserError(f"{other}{name} has {shapes}, but SDXL's layer is {tuple(weight.shape)}; name another")
            if "lora_A.weight" in parts:
                parts["lora_A.weight"] = parts["lora_A.weight"].view(-1, *weight.shape[1:])
                parts["lora_B.weight"] = parts["lora_B.weight"].view(len(weight), -1, *[1] * (weight.ndim - 2))
    return changes


def _fits(change: LayerChange, weight: Tensor) -> bool:
    """Return whether a change is for a layer of this weight, on the meta device."""
    change = LayerChange({name: tensor.to("meta") for name, tensor in change.tensors.items()}, 1.0)
    try:
        return change.matrix().shape == weight.flatten(1).shape == change.on(weight).flatten(1).shape
    except (RuntimeError, IndexError):  # of shapes
        return False


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _own_config(metadata: Values) -> LoRAConfig | None:
    """Return the configuration in the metadata of Atelier's files, None for other files."""
    stated = dict_of(metadata, "task").get("lora")
    return None if stated is None else LoRAConfig.model_validate(stated)


def adapter_state(path: Path, networks: Mapping[str, nn.Module]) -> State:
    """Return the state of a `LoRA` with the tensors of a file."""
    state = {}
    for name, change in read_lora(path, networks).items():
        state |= {f"{name}.{key}": tensor for key, tensor in change.tensors.items()}
    return state


def describe_lora(path: Path, networks: Mapping[str, nn.Module]) -> LoRAConfig:
    """Return the configuration that continues a file, with kind, rank and alpha of each layer. Raises UserError."""
    with readable(path, "LoRA"):
        if (own := _own_config(read_weights(path, shapes_only=True)[1])) is not None:
            return own
        layers = {name: change.settings() for name, change in read_lora(path, networks).items()}
        usual, *_ = layers.values()
        different = {name: settings for name, settings in layers.items() if settings != usual}
        return LoRAConfig.model_validate({**usual, "targets": list(layers), "layers": different})
