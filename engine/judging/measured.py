"""Weights and the images to measure them on, for evaluate.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from data.config import DataConfig
from data.layouts.table import count_values, show_some
from data.load import describe_collection, load_collection
from data.open import Data
from engine.config import MachineConfig
from engine.exports.config import MovedBase
from engine.exports.opened_task import OpenedTask, open_task
from engine.task import Loaders
from engine.tasks.kind import predict_command
from engine.update.runtime import Runtime, choose_trained
from models.predictor import onnx_predictor
from utils.errors import UserError
from utils.hardware import choose_device
from utils.record.logging import log
from utils.record.progress import track
from utils.record.run_reader import RunReader


class _RunData(BaseModel):
    """The keys of a run's configuration that evaluation reads."""

    model_config = ConfigDict(strict=True)

    data: DataConfig
    seed: int


class EvaluationImages(NamedTuple):
    """The images on which weights are measured. is_own: whether the run of the weights has the same images."""

    data: DataConfig
    seed: int
    is_own: bool


def choose_images(data: DataConfig | None, run: str | None, split: str) -> EvaluationImages:
    """Return the images of `data`, or of a run. The images of a run are split as in training.

    split: a validation split is made of other images only if this names a split of training.
    """
    saved = None if run is None else RunReader(Path(run)).part(_RunData)
    if saved is None and data is None:
        raise UserError("data: must be given without run_dir; add to evaluate.py data.root=PATH, or run_dir=RUN")
    if data is None:
        return EvaluationImages(saved.data, saved.seed, True)
    is_own = saved is not None and Path(data.root).resolve() == Path(saved.data.root).resolve()
    fraction = data.validation_fraction if split in ("train", "val") else 0.0
    if is_own:
        fraction = saved.data.validation_fraction
    data = data.changed({"validation_fraction": fraction})
    return EvaluationImages(data, 0 if saved is None else saved.seed, is_own)


@dataclass(frozen=True)
class Measured:
    """Weights, with a split of images to measure them on."""

    weights: OpenedTask
    data: Data
    rows: np.ndarray  # of the split
    split: str
    runtime: Runtime

    def loaders(self) -> Loaders:
        """Return the loaders of the evaluation, which show their progress. Move the task to the device."""
        task = self.weights.task.to(self.runtime.device)
        if self.runtime.channels_last:
            task.to(memory_format=torch.channels_last)
        loaders = self.weights.kind.evaluation(self.data, self.weights.setup, self.rows, training=False)
        if len(self.rows) == 0:
            raise UserError(
                f"split: {self.data.collection.root} has no image of split={self.split}; put images into a folder "
                f"{self.split}/, set split=all or folds=5, or train with images for it (data.validation_fraction=0.1)"
            )
        if loaders["val"].samples < len(self.rows):
            self._report_unlabelled(loaders["val"].samples)
        return {name: track(loader, len(loader), f"evaluating {name}") for name, loader in loaders.items()}

    def _report_unlabelled(self, usable: int) -> None:
        """Warn of images without a known label. Raises UserError (`split`) if no image has one."""
        collection = self.data.collection
        labels = {*count_values(collection.table["label"].take(self.rows))}
        others = show_some(sorted(labels.difference(self.weights.setup.facts.get("class_names", labels))))
        what = f"{usable:,} of {len(self.rows):,} images of split={self.split} have a label that the weights know"
        what += others and f", and others have {others}"
        if not usable:
            command = predict_command(collection, self.rows, self.weights.path)
            raise UserError(f"split: {what}; images without labels are predicted: {command}")
        log.warning("data.root: %s; the others are not measured", what)


def open_measured(
    path: Path, base: MovedBase | None, images: EvaluationImages, split: str, machine: MachineConfig, batch_size: int
) -> Measured:
    """Open weights and images. split: auto is val; for images of no run it is val, else test, else all."""
    graph = onnx_predictor(path, choose_device(machine.device)) if path.suffix == ".onnx" else None
    weights = open_task(path, "evaluation", base, graph=graph)
    runtime = choose_trained(machine, weights.metadata.get("precision"))
    collection = load_collection(images.data)
    source = weights.kind.source(collection, images.data, weights.setup, repeats=False)
    data = Data(collection, source, runtime, seed=images.seed, batch_size=batch_size, run_path=None)
    log.info("%s", describe_collection(collection))
    if split == "auto":
        stated = [name for name in ("val", "test") if len(collection.rows(name))]
        split = "val" if images.is_own else [*stated, "all"][0]
    rows = np.flatnonzero(collection.weights()) if split == "all" else collection.rows(split)
    return Measured(weights, data, rows, split, runtime)
