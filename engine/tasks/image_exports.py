"""The exports of a network on images: ONNX, and the folders and weight files of other libraries.

The libraries are imported where they are used: training needs none of them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.image_data import ImageData
from engine.tasks.kind import Export, ExportSettings, Opened, Rebuilt
from utils.contracts import Batch
from utils.errors import UserError

# The greatest difference from PyTorch that is accepted without `tolerance`, of ONNX as a share of the largest output.
# Measured: 1e-6, 2e-3 and 0.1 at most, with drawn and with varied weights. The metric says what int8 costs.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.5}
_ONNX_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
# The formats of models/export/targets.py, and the file that holds the weights.
_FOLDERS = {
    "timm": "model.safetensors",
    "transformers": "model.safetensors",
    "safetensors": "model.safetensors",
    "pth": "model.pth",
}


def write_folder(name: str, opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    """Write the files of one of `_FOLDERS`."""
    from models.export.targets import TARGETS, export_folder

    target = TARGETS[name]
    network = opened.whole if target.holds_decoder else opened.model.network
    return export_folder(target, network, opened.metadata, folder, settings.tolerance or TOLERANCES["fp32"])


def write_onnx(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    """Write the ONNX file; of int8, the report has the task's metric of both, the file and PyTorch."""
    from models.export.model_card import write_card
    from models.export.onnx_file import OnnxSettings, export_onnx, open_session

    precision = settings.precision
    path = folder / _ONNX_FILES[precision]
    calibration, data = (), None
    if precision == "int8":
        rebuilt = _check_measurable(opened)
        data, count = settings.open_data(rebuilt), settings.calibration_images
        calibration = read_images(rebuilt.kind.pipeline.calibration(data, rebuilt.setup, count), count)
    written = OnnxSettings(precision, settings.dynamic_size, settings.tolerance or TOLERANCES[precision], calibration)
    report = {"file": path.name, "onnx_max_abs_diff": export_onnx(opened.model, opened.metadata, path, written)}
    write_card(folder, "onnx", path.name, opened.metadata)
    return report if data is None else {**report, **measure_loss(rebuilt, data, open_session(path))}


IMAGE_EXPORTS = {
    "onnx": Export(
        lambda settings: _ONNX_FILES[settings.precision], write_onnx, frozenset({"precision", "dynamic_size"})
    ),
    **{name: Export(lambda _, file=file: file, partial(write_folder, name)) for name, file in _FOLDERS.items()},
}


def _check_measurable(opened: Opened) -> Rebuilt:
    if opened.rebuilt is None or opened.model.output.activate is None:
        raise UserError(
            "precision: int8 is measured by the metric of a run with a head, and these weights are not of one; set "
            "precision=fp16"
        )
    return opened.rebuilt


def read_images(loader: Iterable[Batch], count: int) -> Iterator[np.ndarray]:
    """Yield up to `count` readable images of a loader as float32 batches in [0, 1]."""
    left = count
    for batch in loader:
        images = batch["images"][batch["weight"] > 0][:left].cpu()
        left -= len(images)
        if len(images):
            yield _to_unit(images)
        if left <= 0:
            return


class _FileNetwork(nn.Module):
    """An exported file in the place of a task's network: images in [0, 1] to logits."""

    def __init__(self, session: Callable[[np.ndarray], list[np.ndarray]]) -> None:
        super().__init__()
        self._session = session

    def forward(self, images: Tensor) -> Tensor:
        """Return the file's logits [B, K]."""
        return torch.from_numpy(self._session(images.numpy())[0])


class _Unit(nn.Module):
    """In the place of the normalisation, which is inside the file."""

    def forward(self, images: Tensor) -> Tensor:
        """Return uint8 images as float32 in [0, 1]."""
        return images.float() / 255.0


@torch.inference_mode()
def measure_loss(
    rebuilt: Rebuilt, data: ImageData, session: Callable[[np.ndarray], list[np.ndarray]]
) -> dict[str, float]:
    """Return the task's metric of its network and of an exported file, on the CPU, and what the file loses.

    For a classification: `images`, `top1_fp32`, `top1` and `top1_loss`. Do not use the task afterwards.
    """
    task, metric = rebuilt.task, rebuilt.task.best_metric
    loaders = rebuilt.kind.pipeline.evaluation(data, rebuilt.setup, training=False)
    ours = task.evaluate(loaders, 0).scalars
    if not ours.get("samples", 1):
        raise UserError("data.root: no image of the validation split could be read, so the loss is not known")
    task.network, task.normalise = _FileNetwork(session), _Unit()
    theirs = task.evaluate(loaders, 0).scalars
    loss = (ours[metric] - theirs[metric]) * (-1 if task.best_is_lowest else 1)
    images = {"images": ours["samples"]} if "samples" in ours else {}
    return {**images, f"{metric}_fp32": ours[metric], metric: theirs[metric], f"{metric}_loss": loss}


def _to_unit(images: Tensor) -> np.ndarray:
    return images.numpy().astype(np.float32) / 255.0
