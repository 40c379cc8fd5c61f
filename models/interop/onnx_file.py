"""Export a model to one ONNX file, and compare it with PyTorch before it is kept.

input     images  float32 [batch, C, H, W], RGB in [0, 1]; the graph includes the normalisation
outputs   logits, probs  float32 [batch, K]; or features  float32 [batch, C]
metadata  `atelier`: JSON with output, names, preprocessing and licence

A model may have another form (models/onnx_form.py), which the metadata then contain as `form`.

Precisions: fp32; fp16, with every norm, softmax and sigmoid in float32 (models/interop/onnx_precision.py).
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from models.image_model import ImageModel
from models.interop.inference_form import to_inference_form
from models.interop.metadata import licence_entry
from models.interop.onnx_precision import SumsInFloat32, to_fp16
from models.interop.parity import refuse_difference, vary_weights
from models.predictor import open_session
from utils.errors import UserError
from utils.formats.vocabulary import FACTS
from utils.io.files import Values

# ONNX Runtime reads both since 1.15 (May 2023): opset 18 since 1.14, IR 9 since 1.15.
OPSET = 18
IR_VERSION = 9
_MAX_BYTES = 2**31 - 2**22  # protobuf's limit is 2 GiB; 4 MiB are for the graph itself
_CHECKED_BATCHES = (1, 5)
_GRAPH_TOLERANCE = 1e-3  # for the float32 graph with varied weights, when exporting fp16
_LEAST_OUTPUT = 1e-9  # avoids a division by 0 for a head of zeros


def write_onnx(model: ImageModel, metadata: Values, path: Path, precision: str, accepted: float) -> float:
    """Write the file and return the largest difference between its outputs and PyTorch's.

    accepted: the largest difference, relative to the largest output.

    Also compare a copy with varied weights, because with small weights a wrong graph gives almost the right outputs.
    Raises UserError: `tolerance` if either differs by more; `format` if the weights are too large for an ONNX file.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        raise UserError(
            f"format: {metadata['model']['name']} has {size / 2**30:.2f} GiB of weights, but an ONNX file holds at "
            "most 2 GiB; export a smaller network, or predict with the weight file: predict.py weights=RUN"
        )
    shape = metadata["preprocessing"]["channels"], *metadata["preprocessing"]["image_size_hw"]
    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand(count, *shape, generator=generator) for count in _CHECKED_BATCHES]  # the last one is traced
    programs: dict[str, torch.onnx.ONNXProgram] = {}  # by precision: a trace takes nearly all of the time

    def write_and_compare(model: ImageModel, precision: str) -> tuple[float, float]:
        form = to_fp16(to_inference_form(model)) if precision == "fp16" else to_inference_form(model)
        if precision not in programs:
            programs[precision] = _trace(form, samples[-1])
        proto = _fill(programs[precision], form)
        _clean(proto, metadata, model)
        onnx.checker.check_model(proto)
        onnx.save(proto, path)
        return _compare(model, path, samples)

    varied = model.with_network(vary_weights(model.network))
    if precision == "fp16" and not any("grn" in name for name, _ in varied.named_parameters()):
        # In float32, because the maps of a network without GRN may exceed fp16 with varied weights.
        _, relative = write_and_compare(varied, "fp32")
        refuse_difference(relative, _GRAPH_TOLERANCE, "a copy with varied weights")
    else:
        _, relative = write_and_compare(varied, precision)
        refuse_difference(relative, accepted, "a copy with varied weights")
    absolute, relative = write_and_compare(model, precision)
    refuse_difference(relative, accepted, "ONNX Runtime")
    return absolute


def _trace(model: ImageModel, sample: Tensor) -> torch.onnx.ONNXProgram:
    """Return the graph of a model for any batch size, before constants are folded."""
    inputs = (model.form.to_input(sample).contiguous(),)
    sizes = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings(), torch.no_grad(), SumsInFloat32():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, which a user cannot change
        return torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[model.form.input],
            output_names=list(model.form.outputs),
            dynamic_shapes=sizes,
            optimize=False,
            verbose=False,
        )


def _fill(program: torch.onnx.ONNXProgram, model: ImageModel) -> onnx.ModelProto:
    """Return a traced graph with the weights of a model, and its constants folded."""
    traced = program.model
    program.model = traced.clone()
    names = traced.graph.initializers
    program.apply_weights({name: tensor for name, tensor in model.state_dict().items() if name in names})
    program.optimize()
    proto = program.model_proto
    program.model = traced
    return proto


def _clean(proto: onnx.ModelProto, metadata: Values, model: ImageModel) -> None:
    """Set the file's metadata and version, and remove the exporter's notes, which name files of this machine."""
    graph = proto.graph
    for holder in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, proto):
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    keys = ("output", model.output.names_key, "preprocessing", "step", "form", "weights_hash", "thresholds", *FACTS)
    kept = {key: metadata[key] for key in keys if key in metadata}
    onnx.helper.set_model_props(proto, {"atelier": json.dumps({**kept, **licence_entry(metadata)})})


@torch.inference_mode()
def _compare(model: ImageModel, path: Path, samples: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest absolute and relative difference between a file's outputs and PyTorch's.

    Relative means divided by the largest logit or feature. Probabilities are compared, without division, with the
    activation of the file's own logits, or with PyTorch's probabilities if the file has no logits.
    """
    session = open_session(path, torch.device("cpu"))
    absolute = []
    relative = []
    for sample in samples:
        inputs = model.form.to_input(sample)
        expected = dict(zip(model.form.outputs.values(), model(inputs), strict=True))
        arrays = session.run(None, {model.form.input: inputs.numpy()})
        outputs = dict(zip(expected, map(torch.from_numpy, arrays), strict=True))
        for name, target in expected.items():
            absolute.append(float((outputs[name] - target).abs().max()))
            scale = max(float(target.abs().max()), _LEAST_OUTPUT)
            if name == "probs":
                scale = 1.0
                if "logits" in outputs:  # with large logits, small differences of logits are large ones of probs
                    target = model.output.activate(outputs["logits"])
            relative.append(float((outputs[name] - target).abs().max()) / scale)
    return float(np.max(absolute)), float(np.max(relative))  # NaN counts as the largest
