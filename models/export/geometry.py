"""The shape of a ConvNeXt V2, read off its tensors, and what other libraries cannot express of it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.convnextv2 import ConvNeXtV2
from models.weights.layouts import recognise
from utils.errors import UserError

# The published sizes by depths and dims.
SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.dwconv\.weight")


class Geometry(NamedTuple):
    """Depths and dims of the stages, the stem's stride (1: a 3x3 kernel), input channels, and classes (0: no head)."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem_stride: int
    in_channels: int
    num_classes: int

    @property
    def size(self) -> str | None:
        """Return the published size's name, None for another."""
        return next((name for name, shape in SIZES.items() if shape == (self.depths, self.dims)), None)

    def build(self) -> ConvNeXtV2:
        """Return our network of this geometry, with drawn weights."""
        return ConvNeXtV2(
            in_channels=self.in_channels, depths=self.depths, dims=self.dims, stem_stride=self.stem_stride,
            drop_path_rate=0.0, head_init_scale=1.0, num_classes=self.num_classes,
        )  # fmt: skip


def read_geometry(state: Mapping[str, Tensor]) -> Geometry:
    """Return the geometry of a state under official names."""
    blocks: dict[int, dict[int, int]] = {}
    for name, tensor in state.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[int(match[2])] = tensor.shape[0]
    stem = state["downsample_layers.0.0.weight"]
    kernel = stem.shape[-1]
    return Geometry(
        depths=tuple(len(blocks[stage]) for stage in sorted(blocks)),
        dims=tuple(blocks[stage][0] for stage in sorted(blocks)),
        stem_stride=1 if kernel == 3 else kernel,
        in_channels=stem.shape[1],
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
    )


def official_state(network: nn.Module, target: str) -> dict[str, Tensor]:
    """Return a ConvNeXt V2's tensors under official names, ours or timm's.

    Raises UserError (`format`) for another network.
    """
    layout, state = recognise(network.state_dict())
    if layout not in ("official", "timm") or not any(".grn." in name for name in state):
        name = type(network).__name__
        raise UserError(f"format: {target} takes ConvNeXt V2, and not {name}; set format=timm, onnx or safetensors")
    return state


def with_norm(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the final norm that an encoder lacks and timm and transformers have: scale 1, shift 0."""
    width = read_geometry(official).dims[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **official}


def refuse_padding(preprocessing: Mapping[str, Any], library: str) -> None:
    """Raise UserError (`format`) where images are padded first, which a library's transforms do not do as ours."""
    if preprocessing.get("pad", "none") != "none":
        raise UserError(
            f"format: the images were padded before they were resized (augment.pad={preprocessing['pad']}), which "
            f"{library}'s own transforms cannot do; set format=onnx, or train with augment.pad=none"
        )


def refuse_shape(geometry: Geometry, target: str, strides: tuple[int, ...], *, any_stages: bool = False) -> None:
    """Raise UserError (`format`) for a network whose stem or number of stages a library does not have."""
    if len(geometry.depths) != 4 and not any_stages:
        has, found = "ConvNeXt V2 of four stages", len(geometry.depths)
    elif geometry.stem_stride not in strides:
        has = f"a stem of stride {' or '.join(map(str, strides))}"
        found = "a 3x3 stem" if geometry.stem_stride == 1 else f"a stem of stride {geometry.stem_stride}"
    else:
        return
    raise UserError(
        f"format: {target} has {has} only, and this network has {found}; set format=onnx or safetensors, or "
        "transformers for other numbers of stages and a stem of stride 2"
    )
