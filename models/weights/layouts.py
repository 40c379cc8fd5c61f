"""Which layout a file's tensors have, told from their names alone, and the same tensors under official names.

| layout | written by |
|---|---|
| official | facebookresearch/ConvNeXt-V2's released files and fine-tuning, and Atelier |
| minkowski | facebookresearch/ConvNeXt-V2's pretraining |
| timm, transformers, mmpretrain | these libraries, for ConvNeXt V2 |
| other | any other network, under its own names |
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, get_args

from torch import Tensor

from models.weights.minkowski import is_minkowski, to_dense
from models.weights.names import Layout, is_in_layout, translate
from utils.errors import UserError

# Left by DDP, by torch.compile and by wrappers that hold a network as `model` or `network`.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.")
_V1 = re.compile(r"(^|\.)stages\.\d+\.(blocks\.|layers\.)?\d+\.(gamma|layer_scale_parameter)$")
_ENCODER = "encoder."


class Recognised(NamedTuple):
    """A state under official names (under its own for `other`), and the layout that it had."""

    layout: str
    state: dict[str, Tensor]


def recognise(state: Mapping[str, Tensor]) -> Recognised:
    """Return the layout of a state, and the state under official names; prefixes of wrappers are removed."""
    state = strip_wrappers(state)
    if is_minkowski(state):
        return Recognised("minkowski", to_dense(state))
    for layout in get_args(Layout):
        if is_in_layout(state, layout):
            return Recognised(layout, translate(state, layout, "official"))
    inner = {name.removeprefix(_ENCODER): tensor for name, tensor in state.items() if name.startswith(_ENCODER)}
    return Recognised("official" if is_in_layout(inner, "official") else "other", dict(state))


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that every name has, as often as all have one."""
    while state and (prefix := next((text for text in _WRAPPERS if all(name.startswith(text) for name in state)), "")):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def refuse_v1(state: Mapping[str, Tensor], path: object, key: str) -> None:
    """Raise UserError (`key`) for a ConvNeXt V1, which has LayerScale and no GRN."""
    scale = next((name for name in state if _V1.search(name)), None)
    if scale is not None and not any(".grn." in name for name in state):
        raise UserError(
            f"{key}: {path} holds a ConvNeXt V1: it has LayerScale ({scale}) and no GRN, so it does not fit a ConvNeXt "
            "V2; fine-tune the V1 network itself (model=timm model.name=convnext_tiny), or take weights of V2"
        )
