"""The names of SDXL's tensors in diffusers and transformers, and in a single file (generative-models).

| part | prefix in a single file | other differences |
|---|---|---|
| unet | model.diffusion_model. | |
| vae | first_stage_model. | linear layers of attention are 1x1 convolutions |
| text_encoder | conditioner.embedders.0.transformer. | |
| text_encoder_2 | conditioner.embedders.1.model. | q, k, v are one tensor; the projection is transposed |

A table has the module names (or prefixes of them) that differ between the layouts; the longest match in a name is
replaced. SDXL has one topology: three levels in the U-Net, four in the VAE. Text encoders have the prefix `text_model.`
here and in published files. transformers' CLIPTextModel dropped it in release 5.6.
Source: huggingface/diffusers:scripts/convert_diffusers_to_original_sdxl.py, Stability-AI/generative-models.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from sdxl.files.family import PARTS, PREFIXES
from utils.contracts import State, Tensors

_TEXT = "text_model."

_UNET_LAYERS = (
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.attentions.0", "middle_block.1"),
)  # fmt: skip
_UNET_RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
_VAE_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
_BIGG_LAYERS = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"), ("text_projection.weight", "text_projection"),
)  # fmt: skip
_BIGG_LAYER = (
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)  # fmt: skip
_BIGG_DEPTH = 32
_QKV = tuple(f"{name}_proj" for name in "qkv")


def _unet_table() -> Iterator[tuple[str, str]]:
    yield from _UNET_LAYERS
    resnets = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    for level in range(3):
        for layer in range(3):
            # A level of the down side has one resnet and attention less; its third pair of names is unused.
            for side, block in (
                ("down", f"input_blocks.{3 * level + layer + 1}"),
                ("up", f"output_blocks.{3 * level + layer}"),
            ):
                resnets.append((f"{side}_blocks.{level}.resnets.{layer}", f"{block}.0"))
                yield f"{side}_blocks.{level}.attentions.{layer}", f"{block}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.2.conv"
    for ours, theirs in resnets:
        yield from ((f"{ours}.{leaf}", f"{theirs}.{other}") for leaf, other in _UNET_RESNET)


def _vae_table() -> Iterator[tuple[str, str]]:
    for side in ("encoder", "decoder"):
        resnets = [(f"mid_block.resnets.{index}", f"mid.block_{index + 1}") for index in (0, 1)]
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for leaf, other in _VAE_ATTENTION:
            yield f"{side}.mid_block.attentions.0.{leaf}", f"{side}.mid.attn_1.{other}"
        for level in range(4):
            ours, theirs = ("down_blocks", f"down.{level}") if side == "encoder" else ("up_blocks", f"up.{3 - level}")
            resnets += [(f"{ours}.{level}.resnets.{layer}", f"{theirs}.block.{layer}") for layer in range(3)]
            sampler = "downsample" if side == "encoder" else "upsample"
            yield f"{side}.{ours}.{level}.{sampler}rs.0.conv", f"{side}.{theirs}.{sampler}.conv"
        for ours, theirs in resnets:
            yield f"{side}.{ours}", f"{side}.{theirs}"
            yield f"{side}.{ours}.conv_shortcut", f"{side}.{theirs}.nin_shortcut"


def _bigg_table() -> Iterator[tuple[str, str]]:
    yield from _BIGG_LAYERS
    for layer in range(_BIGG_DEPTH):
        for leaf, other in _BIGG_LAYER:
            yield f"text_model.encoder.layers.{layer}.{leaf}", f"transformer.resblocks.{layer}.{other}"


@cache
def _table(part: str, to_single: bool) -> dict[str, str]:
    makers = {"unet": _unet_table, "vae": _vae_table, "text_encoder_2": _bigg_table}
    pairs = list(makers[part]()) if part in makers else []
    return dict(pairs if to_single else (pair[::-1] for pair in pairs))


def rename(part: str, name: str, *, to_single: bool) -> str:
    """Return the other layout's name for a tensor or module of a part, without the part's prefix."""
    table = _table(part, to_single)
    words = name.split(".")
    for end in range(len(words), 0, -1):
        other = table.get(".".join(words[:end]))
        if other is not None:
            return ".".join([other, *words[end:]])
    return name


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
