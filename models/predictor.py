"""From images to class probabilities, by a weight file or by an ONNX file: the same preprocessing, the same names.

Both kinds of file carry class names and preprocessing in their metadata, so nothing else is needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf, NoSuchFile
from pydantic import TypeAdapter
from torch import Tensor, nn

from models.build import build_network
from models.config import ModelConfig
from models.normalise import Normalise
from models.weights import load_into
from utils.errors import UserError
from utils.weights import read_weights


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
    state, metadata = read_weights(path, key)
    if "class_names" not in metadata:
        raise UserError(
            f"{key}: {path} holds no class names, so it is no classifier that Atelier wrote (a pretrained network?); "
            "fine-tune it first: finetune.py init_from=..."
        )
    model = TypeAdapter(ModelConfig).validate_python(metadata["model"])
    network = build_network(model, num_classes=len(metadata["class_names"]))
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
        try:
            self._session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])
        except (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile) as error:
            raise UserError(f"weights: {path} is no readable ONNX file ({str(error).splitlines()[0]})") from None
        found = self._session.get_modelmeta().custom_metadata_map
        if "atelier" not in found:
            raise UserError(f"weights: {path} was not exported by Atelier: it names no classes; use export.py")
        super().__init__(json.loads(found["atelier"]))

    def probs(self, images: Tensor) -> np.ndarray:
        """Return the probabilities."""
        return self._session.run(["probs"], {"images": images.numpy().astype(np.float32) / 255.0})[0]


def load_predictor(path: Path, device: torch.device) -> Predictor:
    """Return the predictor for a file, by its ending."""
    return OnnxPredictor(path, device) if path.suffix == ".onnx" else TorchPredictor(path, device)
