"""The layouts of a ConvNeXt V2's tensors: recognise them by name, translate them, and read depths and widths.

| layout | written by |
|---|---|
| official | facebookresearch/ConvNeXt-V2's released files and fine-tuning, and Atelier |
| minkowski | facebookresearch/ConvNeXt-V2's pretraining, whose encoder has MinkowskiEngine's layers |
| timm, transformers, mmpretrain | these libraries, for ConvNeXt V2 |
| other | any other network, under its own names |

Each layout has its own names for stem, blocks and head. The tables have templates that translate in both directions:
`{s}` is the number of a stage, `{b}` the number of a block. Only GRN and pointwise layers differ in shape.

Source: facebookresearch/ConvNeXt-V2:models/convnextv2.py and utils.py remap_checkpoint_keys (`minkowski`),
huggingface/pytorch-image-models:timm/models/convnext.py, huggingface/transformers:models/convnextv2,
open-mmlab/mmpretrain:models/backbones/convnext.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Layout = Literal["official", "timm", "transformers", "mmpretrain"]

# The names of a layer (for GRN, of a tensor): official, timm's, and transformers' without `convnextv2.`.
_NAMES = {
    "downsample_layers.0.0": ("stem.0", "embeddings.patch_embeddings"),
    "downsample_layers.0.1": ("stem.1", "embeddings.layernorm"),
    "downsample_layers.{s}.0": ("stages.{s}.downsample.0", "encoder.stages.{s}.downsampling_layer.0"),
    "downsample_layers.{s}.1": ("stages.{s}.downsample.1", "encoder.stages.{s}.downsampling_layer.1"),
    "stages.{s}.{b}.dwconv": ("stages.{s}.blocks.{b}.conv_dw", "encoder.stages.{s}.layers.{b}.dwconv"),
    "stages.{s}.{b}.norm": ("stages.{s}.blocks.{b}.norm", "encoder.stages.{s}.layers.{b}.layernorm"),
    "stages.{s}.{b}.pwconv1": ("stages.{s}.blocks.{b}.mlp.fc1", "encoder.stages.{s}.layers.{b}.pwconv1"),
    "stages.{s}.{b}.grn.gamma": ("stages.{s}.blocks.{b}.mlp.grn.weight", "encoder.stages.{s}.layers.{b}.grn.weight"),
    "stages.{s}.{b}.grn.beta": ("stages.{s}.blocks.{b}.mlp.grn.bias", "encoder.stages.{s}.layers.{b}.grn.bias"),
    "stages.{s}.{b}.pwconv2": ("stages.{s}.blocks.{b}.mlp.fc2", "encoder.stages.{s}.layers.{b}.pwconv2"),
    "norm": ("head.norm", "layernorm"),
    "head": ("head.fc", "classifier"),
}


def _list_templates(layout: Layout) -> list[str]:
    """Return the names of a layout's tensors in the order of `_NAMES`; `{leaf}` is weight or bias."""
    templates = []
    for official, (timm, transformers) in _NAMES.items():
        other = official.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        name = {
            "official": official,
            "timm": timm,
            "transformers": transformers if official == "head" else f"convnextv2.{transformers}",
            "mmpretrain": {"norm": "backbone.norm3", "head": "head.fc"}.get(official, f"backbone.{other}"),
        }[layout]
        templates.append(name if ".grn." in official else f"{name}.{{leaf}}")
    return templates


def _compile(template: str) -> re.Pattern[str]:
    """Return the pattern of a template. The prefix is optional, because a backbone saved alone lacks it."""
    text = re.sub(r"\\{([sb])\\}", r"(?P<\1>\\d+)", re.escape(template)).replace(r"\{leaf\}", "(?P<leaf>weight|bias)")
    return re.compile(re.sub(r"^(convnextv2|backbone)\\\.", r"(?:\1\.)?", text))


_TEMPLATES = {layout: _list_templates(layout) for layout in get_args(Layout)}
_PATTERNS = {layout: [_compile(template) for template in templates] for layout, templates in _TEMPLATES.items()}
_DWCONV = list(_NAMES).index("stages.{s}.{b}.dwconv")
# From DDP, torch.compile, and wrappers that hold a network as `model` or `network`.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.")
_ENCODER = "encoder."
_MINKOWSKI_LAYER = re.compile(r"\.(linear|ln)(?=\.(weight|bias)$)")


def recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the layout of a state, and the state under official names (for `other`, under its own names).

    Prefixes of wrappers are removed; an FCMAE keeps the prefix `encoder.` and its decoder.
    """
    state = strip_wrappers(state)
    if any(name.endswith(".kernel") or _MINKOWSKI_LAYER.search(name) for name in state):
        return "minkowski", _minkowski_to_dense(state)
    for layout in get_args(Layout):
        if is_in_layout(state, layout):
            return layout, translate(state, layout, "official")
    if is_in_layout([name.removeprefix(_ENCODER) for name in state if name.startswith(_ENCODER)], "official"):
        return "official", {name: _reshape_for(name, tensor, "official") for name, tensor in state.items()}
    return "other", state


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrappers' prefixes that all names share, repeatedly."""
    while state and (prefix := next((text for text in _WRAPPERS if all(name.startswith(text) for name in state)), "")):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def translate_name(name: str, source: Layout, target: Layout) -> str | None:
    """Return a tensor's name in another layout, or None if the source layout has no such name."""
    for pattern, template in zip(_PATTERNS[source], _TEMPLATES[target]):
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def translate(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """Return a state with the names and shapes of another layout; unknown names stay unchanged."""
    translated = {}
    for name, tensor in state.items():
        new = translate_name(name, source, target)
        translated[new or name] = tensor if new is None else _reshape_for(new, tensor, target)
    return translated


def is_in_layout(names: Iterable[str], layout: Layout) -> bool:
    """Return whether a layout's depthwise convolution is among the names."""
    return any(_PATTERNS[layout][_DWCONV].fullmatch(name) for name in names)


def _reshape_for(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """Return a tensor in a layout's shape: GRN, and pointwise layers saved as convolutions, are reshaped."""
    if ".grn." in name:
        flat = tensor.numel() == tensor.shape[-1]
        return tensor.reshape(-1 if layout in ("timm", "mmpretrain") else (1, 1, 1, -1)) if flat else tensor
    pointwise = translate_name(name, layout, "official")
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and pointwise is not None and ".pwconv" in pointwise:
        return tensor.flatten(1)
    return tensor


def _minkowski_to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of MinkowskiEngine's layers under official dense names; `encoder.` and the decoder are kept.

    | dense | MinkowskiEngine |
    |---|---|
    | dwconv.weight (C, 1, k, k) | dwconv.kernel (k * k, C) |
    | 1.weight (out, in, k, k) | 1.kernel (k * k, in, out) |
    | bias (C) | bias (1, C) of a convolution; linear.bias (C), ln.bias (C) |
    | pwconv1.weight, norm.weight | pwconv1.linear.weight, norm.ln.weight |
    | grn.gamma (1, 1, 1, C) | grn.gamma (1, C) |
    """
    dense = {}
    for name, tensor in state.items():
        if name.endswith(".kernel"):
            dense[f"{name.removesuffix('.kernel')}.weight"] = _kernel_to_weight(tensor)
            continue
        if ".grn." in name and tensor.ndim == 2:
            tensor = tensor[None, None]
        elif name.endswith(".bias") and tensor.ndim == 2:
            tensor = tensor.flatten()
        dense[_MINKOWSKI_LAYER.sub("", name)] = tensor
    return dense


def _kernel_to_weight(kernel: Tensor) -> Tensor:
    """Convert a kernel to a weight. Its first spatial coordinate runs fastest, so the spatial axes are swapped."""
    side = math.isqrt(kernel.shape[0]) if kernel.ndim in (2, 3) else 0
    if side == 0 or side * side != kernel.shape[0]:
        return kernel  # not square: the network will refuse its shape
    if kernel.ndim == 2:
        kernel = kernel[:, None]
    _, inputs, outputs = kernel.shape
    return kernel.permute(2, 1, 0).reshape(outputs, inputs, side, side).transpose(2, 3).contiguous()


# The published sizes: depths and dims.
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
    """Depths and dims of the stages, the stem's stride, input channels, and classes (0: no head)."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem_stride: int
    in_channels: int
    num_classes: int

    @property
    def size(self) -> str | None:
        """Return the name of the published size, or None for other sizes."""
        return next((name for name, shape in SIZES.items() if shape == (self.depths, self.dims)), None)


def read_geometry(state: Mapping[str, Tensor]) -> Geometry:
    """Return the geometry of a state under official names."""
    blocks: dict[int, dict[int, int]] = {}
    for name, tensor in state.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[int(match[2])] = tensor.shape[0]
    stages = [widths for _, widths in sorted(blocks.items())]
    depths = tuple(len(widths) for widths in stages)
    dims = tuple(widths[0] for widths in stages)
    stem = state["downsample_layers.0.0.weight"]
    return Geometry(depths, dims, stem.shape[-1], stem.shape[1], num_classes=len(state.get("head.weight", ())))


def describe_held(state: Mapping[str, Tensor]) -> str:
    """Return, for messages, the `model` settings of a ConvNeXt V2's state in any layout; "" for other networks."""
    official = {name.removeprefix("encoder."): tensor for name, tensor in recognise(state)[1].items()}
    try:
        found = read_geometry(official)
    except (KeyError, IndexError):
        return ""
    channels = "" if found.in_channels == 3 else f" model.in_channels={found.in_channels}"
    if found.size is not None and found.stem_stride == 4:
        return f"model=convnextv2_{found.size}{channels}"
    sizes = f"model.depths={list(found.depths)},model.dims={list(found.dims)}".replace(" ", "").replace(",m", " m")
    return f"{sizes} model.stem_stride={found.stem_stride}{channels}"
