"""The layouts of a ConvNeXt V2's tensors: recognise them by name, and translate them to the official one.

| layout | written by |
|---|---|
| official | facebookresearch/ConvNeXt-V2's files (those of its pretraining through `from_sparse`), and Atelier |
| timm, transformers | these libraries, for ConvNeXt V2 |
| other | any other network, under its own names |

Each layout has its own names for stem, blocks and head. layouts.yaml has templates of these names. Only GRN and
pointwise layers differ in shape.

Source: facebookresearch/ConvNeXt-V2:models/convnextv2.py, huggingface/pytorch-image-models:timm/models/convnext.py,
huggingface/transformers:models/convnextv2.
"""

import itertools
import math
import re
from collections.abc import Iterable

from torch import Tensor

from utils.contracts import State, Tensors
from utils.io.files import read_beside

_ROWS = read_beside(__file__, "layouts.yaml")
LAYOUTS = tuple(_ROWS[0])


def _compile(template: str) -> re.Pattern[str]:
    """Return the pattern of a template. The prefix is optional, because a backbone saved alone lacks it."""
    text = re.sub(r"\\{([sb])\\}", r"(?P<\1>\\d+)", re.escape(template)).replace(r"\{leaf\}", "(?P<leaf>weight|bias)")
    return re.compile(text.replace(r"convnextv2\.", r"(?:convnextv2\.)?"))


_PATTERNS = {layout: [_compile(row[layout]) for row in _ROWS] for layout in LAYOUTS}
# From DDP, torch.compile, and wrappers that hold a network as `model` or `network`.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.")
_ENCODER = "encoder."


def recognise_state(state: Tensors) -> tuple[str, State]:
    """Return the layout of a state, and the state under official names (for `other`, under its own names).

    Prefixes of wrappers are removed; an FCMAE keeps the prefix `encoder.` and its decoder.
    """
    state = strip_wrappers(state)
    if any(name.endswith(".dwconv.kernel") for name in state):
        state = dict(itertools.starmap(from_sparse, state.items()))
    for layout in LAYOUTS:
        if is_in_layout(state, layout):
            return layout, translate(state, layout)
    if is_in_layout([name.removeprefix(_ENCODER) for name in state if name.startswith(_ENCODER)], "official"):
        return "official", translate(state, "official")
    return "other", state


def from_sparse(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return a tensor of MinkowskiEngine's layers under the name and in the shape of a dense layer.

    A kernel is [k * k, in, out], or [k * k, channels] of a depthwise convolution; its rows vary fastest.
    Source: facebookresearch/ConvNeXt-V2:utils.py remap_checkpoint_keys.
    """
    name = re.sub(r"\.(ln|linear)\.", ".", name)
    if not name.endswith(".kernel"):
        return name, tensor.flatten() if name.endswith(".bias") else tensor
    kernel = tensor if tensor.ndim == 3 else tensor[:, None]
    side = math.isqrt(len(kernel))
    return name.removesuffix("kernel") + "weight", kernel.permute(2, 1, 0).unflatten(2, (side, side)).mT.contiguous()


def strip_wrappers(state: Tensors) -> State:
    """Remove the wrappers' prefixes that all names share, repeatedly."""
    while state and (prefix := next((text for text in _WRAPPERS if all(name.startswith(text) for name in state)), "")):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def official_name(name: str, layout: str) -> str:
    """Return the official name of a tensor, or the same name if the layout has no such name."""
    for pattern, row in zip(_PATTERNS[layout], _ROWS):
        if match := pattern.fullmatch(name):
            return row["official"].format(**match.groupdict())
    return name


def translate(state: Tensors, layout: str) -> State:
    """Return a state with official names and shapes; unknown names stay unchanged."""
    names = {name: official_name(name, layout) for name in state}
    return {names[name]: _reshape(names[name], tensor) for name, tensor in state.items()}


def is_in_layout(names: Iterable[str], layout: str) -> bool:
    """Return whether a layout's depthwise convolution is among the names."""
    return any(_PATTERNS[layout][0].fullmatch(name) for name in names)


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the official shape: GRN, and pointwise layers saved as convolutions, are reshaped."""
    if ".grn." in name and tensor.numel() == tensor.shape[-1]:
        return tensor.reshape(1, 1, 1, -1)
    if ".pwconv" in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor
