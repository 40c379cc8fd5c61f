"""The shape of a ConvNeXt V2, read off its tensors."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from models.convnextv2 import ConvNeXtV2
from models.weights.layouts import recognise

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


def describe_held(state: Mapping[str, Tensor]) -> str:
    """Return the `model` settings of the ConvNeXt V2 that a state of any layout holds, for messages; "" for others."""
    official = {name.removeprefix("encoder."): tensor for name, tensor in recognise(state).state.items()}
    try:
        found = read_geometry(official)
    except (KeyError, IndexError):
        return ""
    channels = "" if found.in_channels == 3 else f" model.in_channels={found.in_channels}"
    if found.size is not None and found.stem_stride == 4:
        return f"model=convnextv2_{found.size}{channels}"
    depths, dims = (str(list(values)).replace(" ", "") for values in (found.depths, found.dims))
    return f"model.depths={depths} model.dims={dims} model.stem_stride={found.stem_stride}{channels}"
