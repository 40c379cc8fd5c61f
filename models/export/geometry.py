"""What other libraries cannot express of a ConvNeXt V2, and its tensors as they take them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.layouts import Geometry, read_geometry, recognise
from utils.errors import UserError


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
