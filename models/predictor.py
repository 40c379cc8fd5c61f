"""From images to class probabilities, by a weight file or by an ONNX file: the same preprocessing, the same names.

Both kinds of file carry class names and preprocessing in their metadata, so nothing else is needed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError, Message
from onnxruntime.capi import onnxruntime_pybind11_state as refusals
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from models.build import build_network
from models.config import ModelConfig
from models.normalise import Normalise
from models.weights import check_fit, load_into
from utils.errors import UserError
from utils.io.weights import read_weights

_MAX_SIDE = 16_384  # pixels, of what a file asks images to be resized to
_RUNTIME_REFUSALS = (
    refusals.Fail, refusals.InvalidGraph, refusals.InvalidProtobuf, refusals.NoSuchFile, refusals.InvalidArgument,
    refusals.NotImplemented, refusals.RuntimeException,
)  # fmt: skip


class _Preprocessing(BaseModel):
    """What a file says of its images; the file may come from a stranger."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_size_hw: Annotated[list[Annotated[int, Field(ge=1, le=_MAX_SIDE)]], Field(min_length=2, max_length=2)]
    interpolation: Literal["bilinear", "bicubic"]
    eval_crop: Annotated[float, Field(gt=0.01, le=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    channels: Literal[1, 3]


class _Metadata(BaseModel):
    """What of a file's metadata prediction needs; more may stand there."""

    model_config = ConfigDict(strict=True)

    class_names: Annotated[list[str], Field(min_length=1)]
    preprocessing: _Preprocessing


def _check_metadata(path: Path, key: str, metadata: Any) -> None:
    """Raise UserError that names the first wrong value of a file's metadata."""
    try:
        _Metadata.model_validate(metadata)
    except ValidationError as error:
        raise _wrong_metadata(path, key, error) from None


def _wrong_metadata(path: Path, key: str, error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return UserError(f"{key}: {path} has wrong metadata ({where}: {first['msg']}); make the file anew")


class Classifier(nn.Module):
    """A trained network with its normalisation: uint8, or float in [0, 1], [B, C, H, W] to logits [B, K]."""

    def __init__(self, network: nn.Module, normalise: Normalise) -> None:
        super().__init__()
        self.network, self.normalise = network, normalise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits, probs), both float32 [B, K]."""
        logits = self.network(self.normalise(images)).float()
        return logits, logits.softmax(dim=1)


def load_classifier(path: Path, key: str = "weights") -> tuple[Classifier, dict[str, Any]]:
    """Rebuild a classifier from a weight file alone; returns it in eval mode, with the file's metadata.

    Raises UserError (`key`) where the file is no classifier of Atelier's.
    """

    def build(metadata: dict[str, Any]) -> nn.Module:
        model = TypeAdapter(ModelConfig).validate_python(metadata.get("model"))
        return build_network(model, num_classes=len(metadata["class_names"]))

    def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Refuse what is no classifier's, before anything as large as the metadata ask for is allocated."""
        if "class_names" not in metadata:
            raise UserError(
                f"{key}: {path} holds no class names, so it is no classifier that Atelier wrote (a pretrained "
                "network?); fine-tune it first: finetune.py init_from=..."
            )
        _check_metadata(path, key, metadata)
        try:
            with torch.device("meta"):
                network = build(metadata)
        except ValidationError as error:
            raise _wrong_metadata(path, key, error) from None
        if left := check_fit(network, shapes, keep_head=True):
            raise UserError(
                f"{key}: {path} has no {', '.join(left)} for its {len(metadata['class_names'])} classes; "
                "make the file anew"
            )

    state, metadata = read_weights(path, key, check)
    network = build(metadata)
    load_into(network, state, keep_head=True)
    preprocessing = metadata["preprocessing"]
    normalise = Normalise(preprocessing["mean"], preprocessing["std"], preprocessing["channels"])
    return Classifier(network, normalise).eval(), metadata


class Predictor:
    """Class probabilities of batches of uint8 images; `class_names` and `preprocessing` as in training."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.class_names: list[str] = list(metadata["class_names"])
        self.preprocessing: dict[str, Any] = dict(metadata["preprocessing"])

    def probs(self, images: Tensor) -> np.ndarray:
        """Return float32 [B, K] for uint8 [B, C, H, W] of the preprocessing's size."""
        raise NotImplementedError


class TorchPredictor(Predictor):
    """Predict with a weight file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        classifier, metadata = load_classifier(path)
        super().__init__(metadata)
        self._classifier, self._device = classifier.to(device), device

    @torch.inference_mode()
    def probs(self, images: Tensor) -> np.ndarray:
        """Return the probabilities."""
        return self._classifier(images.to(self._device))[1].cpu().numpy()


class OnnxPredictor(Predictor):
    """Predict with an exported file in ONNX Runtime."""

    def __init__(self, path: Path, device: torch.device) -> None:
        # ONNX Runtime lists the providers that it was built with, not those that work here: torch knows that.
        providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        _refuse_external_data(path)
        try:
            self._session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])
        except _RUNTIME_REFUSALS as error:
            raise _unreadable(path, error) from None
        found = self._session.get_modelmeta().custom_metadata_map
        if "atelier" not in found:
            raise UserError(f"weights: {path} was not exported by Atelier: it names no classes; use export.py")
        try:
            metadata = json.loads(found["atelier"])
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, error) from None
        _check_metadata(path, "weights", metadata)
        self._check_graph(path, len(metadata["class_names"]))
        super().__init__(metadata)

    def _check_graph(self, path: Path, classes: int) -> None:
        """Raise UserError where the graph is not images -> probs of so many classes."""
        inputs = [(value.name, value.type) for value in self._session.get_inputs()]
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        if inputs != [("images", "tensor(float)")] or outputs.get("probs", [])[1:] != [classes]:
            raise UserError(
                f"weights: {path} has the inputs {inputs} and the outputs {outputs}; a classifier that export.py made "
                f"takes 'images', tensor(float), and gives 'probs', [batch, {classes}]"
            )

    def probs(self, images: Tensor) -> np.ndarray:
        """Return the probabilities."""
        return self._session.run(["probs"], {"images": images.numpy().astype(np.float32) / 255.0})[0]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"weights: {path} is no readable ONNX file ({(str(error) or 'damaged').splitlines()[0]})")


def _refuse_external_data(path: Path) -> None:
    """Raise UserError where an ONNX file takes data from other files: export.py puts all into one.

    ONNX Runtime reads what such a file names below its own folder, and older versions whatever it names.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    for tensor in _find_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            named = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            raise UserError(
                f"weights: {path} takes data from another file, {named[:200]!a}, which is not read; export it as one "
                "file (export.py does)"
            )


def _find_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of an ONNX message: of the graph, of graphs in attributes, of functions."""
    stack = [message]
    while stack:
        found = stack.pop()
        if isinstance(found, onnx.TensorProto):
            yield found
            continue
        for field, value in found.ListFields():
            if field.message_type is not None:
                stack += [value] if isinstance(value, Message) else value


def load_predictor(path: Path, device: torch.device) -> Predictor:
    """Return the predictor for a file, by its ending."""
    return OnnxPredictor(path, device) if path.suffix == ".onnx" else TorchPredictor(path, device)
