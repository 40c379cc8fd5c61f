"""A model in fp16 for an ONNX file: norms, softmax and sums compute in float32."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from models.image_model import ImageModel
from models.interop.inference_form import ChannelScale
from models.layers import GRN
from utils.io.files import Values

# Whole modules stay in float32, with the squares before a sum: they exceed the range of fp16 (65,504), or small terms
# are lost, and TensorRT gives wrong results for GRN in fp16 (facebookresearch/ConvNeXt-V2 issue 66).
_WIDE_MODULES = (nn.LayerNorm, nn.GroupNorm, GRN, ChannelScale)
_WIDE_NAMES = ("GlobalResponseNorm", "RmsNorm", "LayerNorm2d")  # timm's own classes
_SUMS = {
    F.softmax, torch.softmax, Tensor.softmax, torch.mean, Tensor.mean, torch.sum, Tensor.sum,
    F.adaptive_avg_pool2d, F.scaled_dot_product_attention,
}  # fmt: skip
_FP16_MAX = 65504.0


class SumsInFloat32(TorchFunctionMode):
    """Compute softmax and sums of fp16 tensors in float32."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Values | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_narrow = any(isinstance(each, Tensor) and each.dtype == torch.float16 for each in args)
        if function not in _SUMS or not is_narrow:
            return function(*args, **kwargs)
        args, kwargs = _widen((args, kwargs))
        return function(*args, **kwargs).half()


def _widen(values: Any) -> Any:
    return tree_map_only(Tensor, lambda each: each.float() if each.dtype == torch.float16 else each, values)


def _narrow_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.half()


def to_fp16(model: ImageModel) -> ImageModel:
    """Return a copy of a model with fp16 weights and maps. Its inputs and outputs stay float32."""
    narrow = copy.deepcopy(model)
    narrow.normalise.register_forward_hook(_narrow_output)
    kept = set()
    for module in narrow.network.modules():
        if module not in kept and (isinstance(module, _WIDE_MODULES) or type(module).__name__ in _WIDE_NAMES):
            kept.update(module.modules())
            module.register_forward_pre_hook(lambda module, inputs: _widen(inputs))
            module.register_forward_hook(_narrow_output)
    for module in set(narrow.network.modules()) - kept:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.clamp(-_FP16_MAX, _FP16_MAX).half()
    return narrow
