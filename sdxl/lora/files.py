"""Read LoRAs of all kinds: files of kohya and LyCORIS (sd-scripts, ComfyUI, the web UIs), diffusers', and our runs'.

The names of a layer's tensors are a row and an ending of spellings.yaml. Source: comfyanonymous/ComfyUI:comfy/lora.py;
huggingface/diffusers:src/diffusers/loaders/lora_conversion_utils.py; Nerogar/OneTrainer:modules/util/convert/lora.
"""

import json
import math
import re
from pathlib import Path

from torch import Tensor

from data.layouts.table import show_some
from models.interop.metadata import dict_of
from sdxl.files.family import PARTS, Networks
from sdxl.files.names import rename
from sdxl.lora.changes import LayerChange
from sdxl.lora.config import LoRAConfig
from sdxl.lora.lora import find_layers
from sdxl.networks import unused_layer
from utils.contracts import State
from utils.errors import UserError
from utils.io.files import Json, Values, read_beside, read_json, readable
from utils.io.weights import read_header, read_weights
from utils.record.logging import log

_TABLE = read_beside(__file__, "spellings.yaml")
_FIRST_ENCODER = ("lora_te1_", "text_encoder_text_model_", "clip_l_", "text_encoders_clip_l_")
_WRAPPERS = re.compile(r"^base_model\.model\.|\bprocessor\.")  # PEFT's, and that of old files of diffusers
OF_FILES = ("kind", "factor", "rank", "alpha", "targets", "layers")
_EMBEDDING = "bundle_emb."  # textual inversion beside a LoRA
_ENDINGS = _TABLE["endings"]


def read_lora(path: Path, networks: Networks) -> dict[str, LayerChange]:
    """Return the changes in a file by the layers' names in `LoRA`, in the shapes of a `LoRALayer`.

    networks: SDXL's; only their shapes are used. Raises UserError for a LoRA of another base model or kind, or other
    files. Changes of the first text encoder's last layer, whose output SDXL does not use, are ignored. Layers that SDXL
    lacks and embeddings are named and left out.
    """
    texts = read_header(path)[1]
    tensors, metadata = read_weights(path)
    stated = texts.get("ss_base_model_version") or texts.get("modelspec.architecture") or "not stated"
    other = f"{path} is no LoRA of SDXL's linear layers and convolutions (base model: {stated[:99]}): "
    layers = find_layers(networks)
    names = {spelling: name for name in layers for spelling in _spell(name)}
    unused = _flat(unused_layer(networks["text_encoder"]))
    tensors_of = {}
    foreign = []
    unread = []
    for full, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if full.endswith(ending)), "")
        stem = _flat(_WRAPPERS.sub("", full.removesuffix(ending)))
        if stem.startswith(_FIRST_ENCODER) and unused in stem:
            continue
        if ending and stem in names:
            tensors_of.setdefault(names[stem], {})[_ENDINGS[ending]] = tensor.float()
        else:
            (foreign if ending or full.startswith(_EMBEDDING) else unread).append(full)
    if unread or (foreign and not tensors_of):
        raise UserError(
            f"{other}its tensor {(unread or foreign)[0][:200]} is of another layer, or of a kind that is not read "
            "(norms, Tucker, OFT, full matrices, ...); name another file"
        )
    if foreign:
        log.warning("%s: %d tensors of no layer of SDXL are left out: %s", path, len(foreign), show_some(foreign))
    changes = {}
    with readable(path, "LoRA"):
        own = _own_config(metadata)
        beside = path.with_name("adapter_config.json")
        stated = read_json(beside) if beside.is_file() else json.loads(texts.get("lora_adapter_metadata", "{}"))
        for name, parts in tensors_of.items():
            weight = layers[name].weight
            alpha = parts.pop("alpha", None)
            if "dora_scale" in parts and parts["dora_scale"].ndim == 1:
                parts["dora_scale"] = parts["dora_scale"].view(-1, *[1] * (weight.ndim - 1))
            change = LayerChange(parts, 1.0)
            if alpha is None:
                alpha = own.layers.get(name, own).alpha if own else _find_alpha(stated, name, change.rank)
            changes[name] = change._replace(alpha=float(alpha))
            if not _fits(change, weight.to("meta")):
                shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in parts.items())
                raise UserError(f"{other}{name} has {shapes}, but SDXL's layer is {tuple(weight.shape)}; name another")
            if "lora_A.weight" in parts:
                parts["lora_A.weight"] = parts["lora_A.weight"].view(-1, *weight.shape[1:])
                parts["lora_B.weight"] = parts["lora_B.weight"].view(len(weight), -1, *[1] * (weight.ndim - 2))
    return changes


def _spell(name: str) -> list[str]:
    """Return the spellings of a layer."""
    network, _, inside = name.partition(".")
    rows = _TABLE["all"] + _TABLE.get(network, [])
    names = {"network": network, "lora": PARTS[network].lora, "comfy": _TABLE["comfy"][network]}
    names["original"] = rename("unet", inside, to_single=True) if network == "unet" else inside
    # Old files of diffusers have to_out for to_out.0.
    return [_flat(row.format(**names, inside=each)) for row in rows for each in (inside, inside.removesuffix(".0"))]


def _find_alpha(stated: Values, name: str, rank: int) -> float:
    """Return the alpha of a layer by PEFT's configuration, without one its rank.

    rsLoRA divides alpha by the root of the rank. Patterns are read as ends of names, not as expressions.
    """
    network, _, inside = name.partition(".")
    own = {key.removeprefix(f"{network}."): value for key, value in stated.items()}
    patterns = (own.get("alpha_pattern") or {}).items()
    given = [alpha for pattern, alpha in patterns if f".{inside}".endswith(f".{pattern.lstrip('^')}")]
    alpha = next(iter(given), own.get("lora_alpha", rank))
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


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


def adapter_state(path: Path, networks: Networks) -> State:
    """Return the state of a `LoRA` with the tensors of a file."""
    state = {}
    for name, change in read_lora(path, networks).items():
        state |= {f"{name}.{key}": tensor for key, tensor in change.tensors.items()}
    return state


def describe_lora(path: Path, networks: Networks) -> Json:
    """Return the values OF_FILES of the `LoRAConfig` that continues a file. Raises UserError."""
    with readable(path, "LoRA"):
        if (own := _own_config(read_weights(path, shapes_only=True)[1])) is not None:
            return own.model_dump()
        layers = {name: change.settings() for name, change in read_lora(path, networks).items()}
        usual, *_ = layers.values()
        different = {name: settings for name, settings in layers.items() if settings != usual}
        return {**usual, "targets": list(layers), "layers": different}
