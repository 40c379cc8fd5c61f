"""A task from a weight file alone: its metadata say kind, network, preprocessing and facts.

The file may come from a stranger: its metadata are checked, and compared with its tensors' shapes, before a network of
the size that they state is allocated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from data.config import DataConfig
from engine.task import fingerprint_frozen
from engine.tasks.kind import Rebuilt
from engine.tasks.kinds import KINDS
from engine.tasks.setups import check_weights, split_networks
from models.image_model import ImageModel
from models.predictor import OnnxPredictor, Predictor, TorchPredictor
from models.weights.fit import load_into
from utils.errors import UserError
from utils.io.weights import read_weights
from utils.record.run_config import CONFIG_FILE, read_run_config


class RunData(BaseModel):
    """The data of a run, as its folder states them."""

    model_config = ConfigDict(strict=True)

    data: DataConfig
    seed: int


def read_run_data(run: Path) -> RunData:
    """Return the data of a run folder. Raises UserError (`run_dir`) where its config.json does not state them."""
    try:
        return RunData.model_validate(read_run_config(run))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"run_dir: {run / CONFIG_FILE} is damaged ({where}: {error.errors()[0]['msg']}); give weights=FILE "
            "data=NAME data.root=PATH in place of run_dir"
        ) from None


def rebuild_task(path: Path, key: str = "weights") -> Rebuilt:
    """Rebuild the task of a weight file that Atelier wrote. Raises UserError (`key`) where the file is not one."""
    found: dict[str, Any] = {}

    def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        found["kind"], found["setup"] = check_weights(path, key, shapes, metadata, KINDS)

    tensors, metadata = read_weights(path, key, check)
    task = found["kind"].build(found["setup"])
    task.load_frozen()
    for name, state in split_networks(task, tensors).items():
        load_into(task.get_submodule(name), state, keep_head=True)
    if (built := fingerprint_frozen(task)) != (saved := metadata.get("frozen", {})):
        raise UserError(
            f"{key}: {path} was trained with other frozen networks ({saved} then, {built} now); restore them"
        )
    return Rebuilt(found["kind"], task.eval(), found["setup"], metadata, str(path))


def load_image_model(path: Path, key: str = "weights") -> tuple[ImageModel, dict[str, Any]]:
    """Return a file's network from images to output, in eval mode, and its metadata with `output` in them.

    Raises UserError (`key`) where the file's task makes nothing of a single image.
    """
    rebuilt = rebuild_task(path, key)
    if rebuilt.kind.output is None:
        name = rebuilt.metadata["task"]["name"]
        raise UserError(f"{key}: {path} is of task {name!r}, which has no output for one image; see evaluate.py")
    return rebuilt.image_model(), {**rebuilt.metadata, "output": rebuilt.kind.output}


def load_predictor(path: Path, device: torch.device, key: str = "weights") -> Predictor:
    """Return the predictor of a weight file or an ONNX file, by its suffix. Raises UserError (`key`)."""
    if path.suffix == ".onnx":
        return OnnxPredictor(path, device, key)
    return TorchPredictor(*load_image_model(path, key), device)
