"""The names of SDXL's tensors in diffusers and transformers, and in a single file (generative-models).

| part | prefix in a single file | other differences |
|---|---|---|
| unet | model.diffusion_model. | |
| vae | first_stage_model. | linear layers of attention are 1x1 convolutions |
| text_encoder | conditioner.embedders.0.transformer. | |
| text_encoder_2 | conditioner.embedders.1.model. | q, k, v are one tensor; the projection is transposed |

names.yaml has the names of modules that differ. SDXL has one topology: three levels in the U-Net, four in the VAE.
Text encoders have the prefix `text_model.` here and in published files. transformers' CLIPTextModel dropped it in
release 5.6.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable
from functools import cache

import torch
from torch import Tensor, nn

from sdxl.files.family import PARTS, PREFIXES
from utils.contracts import State, Tensors
from utils.io.files import read_beside

_TEXT = "text_model."

_QKV = tuple(f"{name}_proj" for name in "qkv")


@cache
def _read_table(part: str, to_single: bool) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern of the names that differ between the layouts, and the other layout's names (names.yaml)."""
    tables = read_beside(__file__, "names.yaml").get(part, {})
    rows = {kind: pairs if to_single else {b: a for a, b in pairs.items()} for kind, pairs in tables.items()}
    layers, inside = ("|".join(map(re.escape, rows.get(kind, ()))) or "$" for kind in ("layers", "inside"))
    pattern = rf"^(?P<layer>{layers})(?P<number>\.\d+)?(\.(?P<inside>{inside}))?(?=\.|$)"
    return re.compile(pattern), {**rows.get("layers", {}), **rows.get("inside", {})}


def rename(part: str, name: str, *, to_single: bool) -> str:
    """Return the other layout's name for a tensor or module of a part, without the part's prefix."""
    pattern, other = _read_table(part, to_single)
    if (found := pattern.match(name)) is None:
        return name
    inside = found["inside"]
    renamed = other[found["layer"]] + (found["number"] or "")
    return renamed + (f".{other[inside]}" if inside else "") + name[found.end() :]


def drop_unused(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """Return names without those that match a pattern."""
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def to_single_file(part: str, state: Tensors) -> State:
    """Convert a part's tensors to the layout of a single file."""
    renamed = {}
    for name, tensor in _join_qkv(state).items() if part == "text_encoder_2" else state.items():
        renamed[PREFIXES[part] + rename(part, name, to_single=True)] = _reshape(part, name, tensor, to_single=True)
    return renamed


def from_single_file(part: str, state: Tensors) -> State:
    """Return a part's tensors in a single file, under the names of diffusers or transformers.

    Unknown names stay unchanged. Other parts and tensors that carry nothing are skipped.
    """
    renamed = {}
    for full, tensor in state.items():
        name = full.removeprefix(PREFIXES[part])
        if name == full:
            continue
        new = rename(part, name, to_single=False)
        renamed[new] = _reshape(part, new, tensor, to_single=False)
    return from_folder(part, _split_qkv(renamed) if part == "text_encoder_2" else renamed)


def _reshape(part: str, name: str, tensor: Tensor, *, to_single: bool) -> Tensor:
    """Return a tensor in the shape of the other layout. name: the name in diffusers or transformers."""
    if name == "text_projection.weight":
        return tensor.T.contiguous()
    if part == "vae" and ".attentions." in name and ".to_" in name and name.endswith("weight"):
        return tensor[:, :, None, None] if to_single else tensor.flatten(1)
    return tensor


def _join_qkv(state: Tensors) -> State:
    joined = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", other)] for other in _QKV]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = tensor
    return joined


def _split_qkv(state: Tensors) -> State:
    split = {}
    for name, tensor in state.items():
        if ".in_proj_" in name:
            split.update((name.replace("in_proj_", f"{other}."), part) for other, part in zip(_QKV, tensor.chunk(3)))
        else:
            split[name] = tensor
    return split


def from_folder(part: str, state: Tensors) -> State:
    """Return the tensors of a part, from a folder or a network, under the names of published folders."""
    prefix = "" if part != "text_encoder" or any(name.startswith(_TEXT) for name in state) else _TEXT
    return {prefix + name: state[name] for name in drop_unused(state, PARTS[part].unused)}


def part_state(part: str, network: nn.Module) -> State:
    """Return a network's tensors under the names of published folders, whatever the release of transformers."""
    return from_folder(part, network.state_dict())


def text_prefix(part: str, network: nn.Module) -> str:
    """Return what precedes a network's names in files: transformers' CLIPTextModel has no `text_model.` from 5.6 on."""
    return _TEXT if part == "text_encoder" and not hasattr(network, "text_model") else ""
