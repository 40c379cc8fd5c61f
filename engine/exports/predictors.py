"""Open what predicts: an ONNX file, without torch, or the weight file of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from models.predictor import Predictor, onnx_predictor
from utils.start import open_name

if TYPE_CHECKING:
    import torch


def load_predictor(path: Path, device: "torch.device | str") -> Predictor:
    """Return the predictor of a weight file or, by its suffix, an ONNX file. Raises UserError."""
    if path.suffix == ".onnx":
        return onnx_predictor(path, device)
    return open_name("engine.exports.opened_task:open_predictor")(path, device)
