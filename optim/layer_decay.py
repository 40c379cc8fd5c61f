"""Layer-wise learning-rate decay of ConvNeXt: which layer a parameter belongs to, and its rate's scale.

A parameter with id k has scale decay ** (last + 1 - k); the ids come from published parameter names
(`downsample_layers.i`, `stages.s.b`), for any depths.

Source: facebookresearch/ConvNeXt-V2:optim_factory.py (`single`, `group`); huggingface/pytorch-image-models
group_matcher (`timm`: as `single`, with the stem one below).
"""

import re
from collections.abc import Sequence

from utils.errors import UserError

_GROUP_LAST = 12


def layer_id(name: str, depths: Sequence[int], kind: str) -> int:
    """Return a parameter's layer id; head, final norm and whatever is not encoder have the highest (scale 1)."""
    last = last_layer(depths, kind)
    stem = {"single": 1, "group": 0, "timm": 0}[kind]
    if match := re.search(r"(?:^|\.)downsample_layers\.(\d+)\.", name):
        stage = int(match.group(1))
        if stage == 0:
            return stem
        if kind == "group":
            return stage + 1 if stage < len(depths) - 1 else _GROUP_LAST
        return sum(depths[:stage]) + 1
    if match := re.search(r"(?:^|\.)stages\.(\d+)\.(\d+)\.", name):
        stage, block = int(match.group(1)), int(match.group(2))
        if kind != "group":
            return sum(depths[:stage]) + block + 1
        if stage == len(depths) - 1:
            return _GROUP_LAST
        return stage + 1 if stage < 2 else min(3 + block // 3, _GROUP_LAST - 1)
    return last + 1


def last_layer(depths: Sequence[int], kind: str) -> int:
    """Return the highest id below the head's: the number of blocks, or 12 for `group`."""
    return _GROUP_LAST if kind == "group" else sum(depths)


def layer_scale(name: str, depths: Sequence[int] | None, kind: str, decay: float) -> float:
    """Return the rate's scale of a parameter. Raises where layer decay is asked of a network without stages."""
    if decay == 1.0:
        return 1.0
    if depths is None:
        raise UserError(
            f"optim.layer_decay: {decay:g} needs a ConvNeXt V2 network, whose stages number the layers; "
            "set optim.layer_decay=1.0 or model=convnextv2_tiny"
        )
    return decay ** (last_layer(depths, kind) + 1 - layer_id(name, depths, kind))
