"""The names of a ConvNeXt V2's tensors in each layout, as templates that translate in both directions.

A network consists of a stem, blocks and a head, and each layout names these parts differently. `{s}` is the number of
a stage and `{b}` that of a block. The tensors are the same, but GRN and pointwise layers differ in shape
(`reshape_for`).

Source: facebookresearch/ConvNeXt-V2:models/convnextv2.py (`official`), huggingface/pytorch-image-models:
timm/models/convnext.py, huggingface/transformers:models/convnextv2, open-mmlab/mmpretrain:models/backbones/convnext.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

Layout = Literal["official", "timm", "transformers", "mmpretrain"]

_PARTS = (
    "stem", "stem_norm", "down_norm", "down", "dwconv", "norm", "pwconv1", "grn", "pwconv2", "final_norm", "head",
)  # fmt: skip
_TEMPLATES: dict[Layout, tuple[str, ...]] = {
    "official": (
        "downsample_layers.0.0", "downsample_layers.0.1", "downsample_layers.{s}.0", "downsample_layers.{s}.1",
        "stages.{s}.{b}.dwconv", "stages.{s}.{b}.norm", "stages.{s}.{b}.pwconv1", "stages.{s}.{b}.grn",
        "stages.{s}.{b}.pwconv2", "norm", "head",
    ),
    "timm": (
        "stem.0", "stem.1", "stages.{s}.downsample.0", "stages.{s}.downsample.1",
        "stages.{s}.blocks.{b}.conv_dw", "stages.{s}.blocks.{b}.norm", "stages.{s}.blocks.{b}.mlp.fc1",
        "stages.{s}.blocks.{b}.mlp.grn", "stages.{s}.blocks.{b}.mlp.fc2", "head.norm", "head.fc",
    ),
    "transformers": (
        "convnextv2.embeddings.patch_embeddings", "convnextv2.embeddings.layernorm",
        "convnextv2.encoder.stages.{s}.downsampling_layer.0", "convnextv2.encoder.stages.{s}.downsampling_layer.1",
        "convnextv2.encoder.stages.{s}.layers.{b}.dwconv", "convnextv2.encoder.stages.{s}.layers.{b}.layernorm",
        "convnextv2.encoder.stages.{s}.layers.{b}.pwconv1", "convnextv2.encoder.stages.{s}.layers.{b}.grn",
        "convnextv2.encoder.stages.{s}.layers.{b}.pwconv2", "convnextv2.layernorm", "classifier",
    ),
    "mmpretrain": (
        "backbone.downsample_layers.0.0", "backbone.downsample_layers.0.1", "backbone.downsample_layers.{s}.0",
        "backbone.downsample_layers.{s}.1", "backbone.stages.{s}.{b}.depthwise_conv", "backbone.stages.{s}.{b}.norm",
        "backbone.stages.{s}.{b}.pointwise_conv1", "backbone.stages.{s}.{b}.grn",
        "backbone.stages.{s}.{b}.pointwise_conv2", "backbone.norm3", "head.fc",
    ),
}  # fmt: skip
# The names of GRN's two tensors: the factor and the shift.
_GRN_LEAVES: dict[Layout, tuple[str, str]] = {
    "official": ("gamma", "beta"),
    "timm": ("weight", "bias"),
    "transformers": ("weight", "bias"),
    "mmpretrain": ("gamma", "beta"),
}
_LEAVES = ("weight", "bias")
# Where a layout may lack the prefix: a backbone that was saved alone.
_PREFIX: dict[Layout, str] = {"transformers": "convnextv2.", "mmpretrain": "backbone."}


def _compile(layout: Layout) -> list[tuple[str, re.Pattern[str]]]:
    patterns = []
    for part, template in zip(_PARTS, _TEMPLATES[layout]):
        text = re.escape(template).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
        leaves = _GRN_LEAVES[layout] if part == "grn" else _LEAVES
        if prefix := _PREFIX.get(layout):
            text = text.replace(re.escape(prefix), f"(?:{re.escape(prefix)})?", 1)
        patterns.append((part, re.compile(rf"{text}\.(?P<leaf>{'|'.join(leaves)})")))
    return patterns


_PATTERNS = {layout: _compile(layout) for layout in _TEMPLATES}


def translate_name(name: str, source: Layout, target: Layout) -> str | None:
    """Return a tensor's name in another layout; None where the source layout has no such name."""
    for part, pattern in _PATTERNS[source]:
        if match := pattern.fullmatch(name):
            groups = match.groupdict()
            leaf = groups.pop("leaf")
            if part == "grn":
                leaf = _GRN_LEAVES[target][_GRN_LEAVES[source].index(leaf)]
            return f"{_TEMPLATES[target][_PARTS.index(part)].format(**groups)}.{leaf}"
    return None


def translate(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """Return a state under the names of another layout, in its shapes; unknown names stay as they are."""
    translated = {}
    for name, tensor in state.items():
        new = translate_name(name, source, target)
        translated[name if new is None else new] = tensor if new is None else reshape_for(new, tensor, target)
    return translated


def reshape_for(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """Return a tensor in the shape that a layout has for its name: GRN, and pointwise layers saved as convolutions."""
    if ".grn." in name:
        flat = tensor.numel() == tensor.shape[-1]
        return tensor.reshape(-1 if layout in ("timm", "mmpretrain") else (1, 1, 1, -1)) if flat else tensor
    pointwise = translate_name(name, layout, "official")
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and pointwise is not None and ".pwconv" in pointwise:
        return tensor.flatten(1)
    return tensor


def is_in_layout(names: Iterable[str], layout: Layout) -> bool:
    """Tell whether one of the names is that of a block's depthwise convolution in a layout."""
    pattern = _PATTERNS[layout][_PARTS.index("dwconv")][1]
    return any(pattern.fullmatch(name) for name in names)
