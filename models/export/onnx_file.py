"""Export a model to one ONNX file, compared with PyTorch before it is kept.

input     images  float32 [batch, C, H, W], RGB in [0, 1]; the normalisation is inside
outputs   logits, probs  float32 [batch, K]; or features  float32 [batch, C]
metadata  `atelier`: JSON with output, names, preprocessing and licence

A model may state another form (models/onnx_form.py), which the metadata then have as `form`.

Precisions: fp32; fp16, where every norm, softmax and sigmoid stays in float32; int8 (models/export/onnx_precision.py).
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from models.export.inference_form import to_inference_form
from models.export.model_card import licence_entry
from models.export.onnx_precision import to_fp16, to_int8
from models.export.parity import refuse_difference, vary_weights
from models.image_model import ImageModel
from utils.errors import UserError
from utils.vocabulary import FACTS

# What ONNX Runtime reads since 1.15 (May 2023): opset 18 since 1.14, IR 9 since 1.15.
OPSET, IR_VERSION = 18, 9
_MAX_BYTES = 2**31 - 2**22  # protobuf's limit is 2 GiB; 4 MiB are for the graph itself
_CHECKED_BATCHES = (1, 5)
_LARGEST_SIDE = 4096  # pixels, with dynamic_size
_GRAPH_TOLERANCE = 1e-3  # of the float32 graph with varied weights, for a file in fp16 or int8
_LEAST_OUTPUT = 1e-9  # avoids a division by 0 for a head that was set to 0


@dataclass(frozen=True)
class OnnxSettings:
    """How a file is written. tolerance: the greatest accepted difference from PyTorch, relative to the largest output.

    dynamic_size: the file takes images of any size from the network's stride up. calibration: float32 images
    [B, C, H, W] in [0, 1] for int8, which is compared on their first batch. Other files are compared on noise.
    """

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    dynamic_size: bool = False
    tolerance: float = 1e-3
    calibration: Iterable[np.ndarray] = ()


def export_onnx(model: ImageModel, metadata: Mapping[str, Any], path: Path, settings: OnnxSettings) -> float:
    """Write the file and return the greatest difference of its outputs from PyTorch's.

    A copy with varied weights is compared too, because with small weights a wrong graph gives almost the right outputs.
    Raises UserError: `tolerance` if the outputs of either differ by more; `format` for weights above the size of an
    ONNX file; `dynamic_size` for a network of one size; `calibration_images` if there is none. Then no file is written
    and an old one stays.
    """
    _refuse_large(model, metadata, path)
    samples = _draw_samples(metadata["preprocessing"], model, settings.dynamic_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary, compared = Path(folder) / path.name, samples
        if settings.precision == "int8":  # on the first of its images: noise is outside its ranges
            images = iter(settings.calibration)
            compared = [torch.from_numpy(batch) for batch in islice(images, 1)]
            if not compared:
                raise UserError("calibration_images: no image could be read; check data.root")
            settings = replace(settings, calibration=chain([compared[0].numpy()], images))
        _write(model, metadata, temporary, samples[-1], settings)
        absolute, relative = _compare(model, temporary, compared)
        refuse_difference(relative, settings.tolerance, "ONNX Runtime")
        _check_varied(model, metadata, Path(folder) / "varied.onnx", samples, settings)
        os.replace(temporary, path)
    return absolute


def _write(
    model: ImageModel, metadata: Mapping[str, Any], path: Path, sample: torch.Tensor, settings: OnnxSettings
) -> None:
    """Write a model's file, traced with a sample."""
    rewritten = to_inference_form(model)
    proto = _trace(rewritten, sample, settings.dynamic_size)
    if settings.precision == "fp16":
        proto = to_fp16(proto, rewritten)
    elif settings.precision == "int8":
        proto = to_int8(proto, rewritten, settings.calibration)
    _clean(proto, metadata, model)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _check_varied(
    model: ImageModel,
    metadata: Mapping[str, Any],
    path: Path,
    samples: Sequence[torch.Tensor],
    settings: OnnxSettings,
) -> None:
    """Export a copy with varied weights and compare it; raises UserError (`tolerance`) if outputs differ.

    The copy is in float32 for int8, and for fp16 of a network without GRN: the maps of others may grow beyond fp16.
    """
    varied = model.with_network(vary_weights(model.network))
    in_fp16 = settings.precision == "fp16" and any("grn" in name for name, _ in varied.named_parameters())
    as_asked = in_fp16 or settings.precision == "fp32"
    _write(varied, metadata, path, samples[-1], settings if as_asked else replace(settings, precision="fp32"))
    tolerance = settings.tolerance if as_asked else _GRAPH_TOLERANCE
    refuse_difference(_compare(varied, path, samples)[1], tolerance, "a copy with varied weights")


def _refuse_large(model: ImageModel, metadata: Mapping[str, Any], path: Path) -> None:
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        name = metadata.get("model", {}).get("name", "the network")
        raise UserError(
            f"format: {name} has {size / 2**30:.2f} GiB of weights and one ONNX file holds at most 2 GiB, so {path} "
            "cannot be written; export a smaller network (model=convnextv2_large, say), or predict with the weights "
            "themselves: predict.py weights=RUN"
        )


def _draw_samples(preprocessing: Mapping[str, Any], model: ImageModel, dynamic_size: bool) -> list[torch.Tensor]:
    """Return images of noise in [0, 1] of the sizes that are compared; the last is what the model is traced with."""
    height, width = preprocessing["image_size_hw"]
    shapes = [(count, height, width) for count in _CHECKED_BATCHES]
    if dynamic_size:
        stride = getattr(model.network, "total_stride", 32)
        shapes.insert(0, (2, height + stride, width + 2 * stride))
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, preprocessing["channels"], *size, generator=generator) for count, *size in shapes]


def _trace(model: ImageModel, sample: torch.Tensor, dynamic_size: bool) -> onnx.ModelProto:
    """Return the graph of a model at any batch size, and at any image size where asked."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        dims |= {axis: torch.export.Dim(name, max=_LARGEST_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside the exporter, which a user cannot change
            proto = torch.onnx.export(
                model,
                (model.form.to_input(sample),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[model.form.input],
                output_names=list(model.form.outputs),
                dynamic_shapes={"images": dims},
                verbose=False,
            ).model_proto
    except torch.onnx.errors.OnnxExporterError as error:
        if not dynamic_size:
            raise
        raise _one_size(model, str(error.__cause__ or error).strip().splitlines()[0]) from error
    finally:
        exporter.setLevel(level)
    sides = proto.graph.input[0].type.tensor_type.shape.dim[2:]
    if dynamic_size and not all(side.dim_param for side in sides):
        raise _one_size(model, f"it was traced for {' x '.join(str(side.dim_value) for side in sides)} pixels alone")
    return proto


def _one_size(model: ImageModel, reason: str) -> UserError:
    name = type(model.network).__name__
    return UserError(
        f"dynamic_size: true, but {name} cannot be exported for images of any size ({reason}); set dynamic_size=false"
    )


def _clean(proto: onnx.ModelProto, metadata: Mapping[str, Any], model: ImageModel) -> None:
    """Set the file's metadata and version; remove the exporter's notes, which name files of this machine."""
    graph = proto.graph
    for holder in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, proto):
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    keys = ("output", model.output.names_key, "preprocessing", "step", "form", "vocabulary", "thresholds", *FACTS)
    kept = {key: metadata[key] for key in keys if key in metadata}
    onnx.helper.set_model_props(proto, {"atelier": json.dumps({**kept, **licence_entry("licence", metadata)})})


@torch.inference_mode()
def _compare(model: ImageModel, path: Path, samples: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the greatest difference of a file's outputs from PyTorch's, and that of its logits as a share of them.

    The share is of the largest logit, or feature. The probabilities of the file must also be those of its own logits,
    or, without these, PyTorch's.
    """
    session, absolute, relative = open_session(path), [], []
    for sample in samples:
        taken = model.form.to_input(sample)
        wanted = dict(zip(model.form.outputs.values(), model(taken), strict=True))
        found = dict(zip(wanted, map(torch.from_numpy, session(taken.numpy())), strict=True))
        absolute += [_greatest(found[what], wanted[what]) for what in wanted]
        for what, ours in wanted.items():
            scale = max(float(ours.abs().max()), _LEAST_OUTPUT)
            if what == "probs":  # large logits make small differences of theirs great ones of the probs
                ours, scale = model.output.activate(found["logits"]) if "logits" in found else ours, 1.0
            relative.append(_greatest(found[what], ours) / scale)
    return float(np.max(absolute)), float(np.max(relative))  # NaN counts as the greatest


def _greatest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def open_session(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function from a batch of what a file takes to its outputs, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return lambda images: session.run(None, {taken.name: images})
