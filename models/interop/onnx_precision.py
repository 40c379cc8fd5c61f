"""Convert an ONNX graph to fp16, with reductions in float32."""

import re

import numpy as np
import onnx
from torch import nn

from models.interop.inference_form import ChannelScale
from models.layers import GRN
from utils.errors import UserError

_WIDE_OPERATORS = (
    # Sums over many values: squares exceed the range of fp16 (65,504), or small terms are lost.
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization", "LpNormalization",
    "Softmax", "LogSoftmax", "Sigmoid", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSumExp", "GlobalAveragePool", "GlobalLpPool",
    # Operators whose types are attributes or fixed.
    "Cast", "Constant", "ConstantOfShape", "Resize", "Range", "RandomNormal", "RandomUniform",
)  # fmt: skip
_WIDE_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.Softmax, nn.Sigmoid, GRN, ChannelScale)
_WIDE_NAMES = ("GlobalResponseNorm", "RmsNorm", "LayerNorm2d")  # timm's own classes
_FP32 = onnx.TensorProto.FLOAT
_FP16_MAX = 65504.0
_SCOPES = "pkg.torch.onnx.name_scopes"


def to_fp16(proto: onnx.ModelProto, model: nn.Module) -> onnx.ModelProto:
    """Return the graph with fp16 weights and maps; norms, softmax, sigmoid and every reduction compute in float32.

    Whole modules stay in float32, including the squares before a reduction, because TensorRT gives wrong results for
    GRN in fp16 (facebookresearch/ConvNeXt-V2 issue 66). Inputs and outputs stay float32. Raises UserError (`precision`)
    for a graph with branches or loops.
    """
    wide = {
        name
        for name, module in model.named_modules()
        if isinstance(module, _WIDE_MODULES) or type(module).__name__ in _WIDE_NAMES
    }
    nodes = {  # the exporter writes the modules in which a node was traced as "['', 'network', 'network.norm']"
        node.name
        for node in proto.graph.node
        for entry in node.metadata_props
        if entry.key == _SCOPES and not wide.isdisjoint(re.findall(r"'([^']*)'", entry.value))
    }
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    return _Fp16Graph(graph, nodes).convert(proto)


class _Fp16Graph:
    """A float32 graph whose nodes are rewritten one by one to fp16 or float32, with casts between the two."""

    def __init__(self, graph: onnx.GraphProto, wide_nodes: set[str]) -> None:
        self._graph = graph
        self._wide_nodes = wide_nodes
        typed = (*graph.input, *graph.value_info, *graph.output)
        self._floats = {value.name for value in typed if value.type.tensor_type.elem_type == _FP32}
        self._weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == _FP32}
        self._narrow: set[str] = set()  # tensors that a node writes as fp16
        self._nodes: list[onnx.NodeProto] = []
        self._initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type != _FP32}
        self._casts: set[str] = set()

    def convert(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """Return the model with the rewritten graph."""
        outputs = {value.name for value in self._graph.output}
        for node in self._graph.node:
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise UserError(f"precision: fp16 takes no graph with branches, but this has {node.op_type}; set fp32")
            wide = node.op_type in _WIDE_OPERATORS or node.name in self._wide_nodes
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [self._read(name, wide) for name in node.input]
            ends = [] if wide else [name for name in node.output if name in outputs]
            copy.output[:] = [f"{name}__fp16" if name in ends else name for name in node.output]
            self._nodes.append(copy)
            if not wide:
                self._narrow |= {name for name in node.output if name in self._floats}
            self._nodes += [_cast(f"{name}__fp16", name, _FP32) for name in ends]
            self._narrow -= set(ends)
        result = onnx.ModelProto()
        result.CopyFrom(proto)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend(self._nodes)
        result.graph.initializer.extend(self._initializers.values())
        return result

    def _read(self, name: str, wide: bool) -> str:
        """Return the name under which a wide or narrow node reads a tensor, and add a conversion if it is missing."""
        if name in self._weights:
            weight = self._weights[name]
            if wide:
                self._initializers[name] = weight
                return name
            if f"{name}__fp16" not in self._initializers:
                values = np.clip(onnx.numpy_helper.to_array(weight), -_FP16_MAX, _FP16_MAX).astype(np.float16)
                self._initializers[f"{name}__fp16"] = onnx.numpy_helper.from_array(values, f"{name}__fp16")
            return f"{name}__fp16"
        if name not in self._floats or wide != (name in self._narrow):
            return name
        target = f"{name}__to_{'fp32' if wide else 'fp16'}"
        if target not in self._casts:
            self._casts.add(target)
            self._nodes.append(_cast(name, target, _FP32 if wide else onnx.TensorProto.FLOAT16))
        return target


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=f"{target}__cast", to=dtype)
