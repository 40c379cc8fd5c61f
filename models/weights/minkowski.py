"""The layout of checkpoints of the official pretraining, whose encoder is made of MinkowskiEngine's layers.

    dense                         MinkowskiEngine
    dwconv.weight (C, 1, k, k)    dwconv.kernel (k * k, C)
    1.weight (out, in, k, k)      1.kernel (k * k, in, out)
    bias (C)                      bias (1, C) of a convolution; linear.bias (C), ln.bias (C)
    pwconv1.weight                pwconv1.linear.weight
    norm.weight                   norm.ln.weight
    grn.gamma (1, 1, 1, C)        grn.gamma (1, C)

A kernel's first spatial coordinate runs fastest, so the two spatial axes are swapped. The stem, its norm and the
decoder are dense in both. Source: facebookresearch/ConvNeXt-V2:utils.py remap_checkpoint_keys.
Differs: dense GRN tensors are left as they are, where the official function adds axes to any.
"""

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_LAYER = re.compile(r"\.(linear|ln)(?=\.(weight|bias)$)")


def is_minkowski(names: Iterable[str]) -> bool:
    """Tell whether a state has tensors of MinkowskiEngine's layers."""
    return any(name.endswith(".kernel") or _LAYER.search(name) for name in names)


def to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under official dense names; the prefix `encoder.` and the decoder stay."""
    dense = {}
    for name, tensor in state.items():
        if name.endswith(".kernel"):
            dense[f"{name.removesuffix('.kernel')}.weight"] = _kernel_to_weight(tensor)
            continue
        name = _LAYER.sub("", name)
        if ".grn." in name and tensor.ndim == 2:
            tensor = tensor[None, None]
        elif name.endswith(".bias") and tensor.ndim == 2:
            tensor = tensor.flatten()
        dense[name] = tensor
    return dense


def _kernel_to_weight(kernel: Tensor) -> Tensor:
    side = math.isqrt(kernel.shape[0]) if kernel.ndim in (2, 3) else 0
    if side == 0 or side * side != kernel.shape[0]:
        return kernel  # of no square kernel: the network refuses its shape
    if kernel.ndim == 2:
        return kernel.permute(1, 0).reshape(kernel.shape[1], 1, side, side).transpose(2, 3).contiguous()
    _, inputs, outputs = kernel.shape
    return kernel.permute(2, 1, 0).reshape(outputs, inputs, side, side).transpose(2, 3).contiguous()
