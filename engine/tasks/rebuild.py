"""A task from a weight file alone: its metadata say kind, network, preprocessing and facts.

The file may come from a stranger: its metadata are checked, and compared with its tensors' shapes, before a network of
the size that they state is allocated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from data.config import DataConfig
from engine.task import Task, fingerprint_frozen
from engine.tasks.kind import Kind, Rebuilt, Setup
from engine.tasks.kinds import find_kind
from models.image_model import ImageModel
from models.predictor import OnnxPredictor, Predictor, TorchPredictor, wrong_metadata
from models.weights.fit import fit_state, load_into
from utils.config.recipe import with_added
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
        kind, setup = _read_setup(path, key, metadata)
        with torch.device("meta"):
            task = kind.build(setup)
        for name, state in _split(task, shapes).items():
            if missing := fit_state(task.get_submodule(name), state, keep_head=True, key=key).left:
                raise UserError(f"{key}: {path} lacks {', '.join(missing)}; export or train the file again")
        found.update(kind=kind, setup=setup)

    tensors, metadata = read_weights(path, key, check)
    task = found["kind"].build(found["setup"])
    task.load_frozen()
    for name, state in _split(task, tensors).items():
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


def _read_setup(path: Path, key: str, metadata: dict[str, Any]) -> tuple[Kind, Setup]:
    """Return a file's kind and setup. Raises UserError that names the first wrong value of its metadata."""
    if "task" in metadata and metadata["task"] is None and metadata.get("output") == "features":
        raise UserError(
            f"{key}: {path} has features only, neither a head nor a task; load it with init_from={path}, or export the "
            "run without backbone_only"
        )
    if "task" not in metadata or "model" not in metadata or not isinstance(metadata["task"], dict):
        raise UserError(
            f"{key}: {path} was not written by a run of Atelier; name a run folder or such a file. If it is somebody "
            "else's, add model=... augment=... (evaluate.py, export.py); for predict.py convert it first: python "
            f"export.py format=onnx weights={path} model=... augment=... output=FOLDER"
        )
    kind = find_kind(metadata["task"].get("name"), f"{key}: {path}")
    kind.pipeline.check_metadata(path, key, {**metadata, "output": kind.output})
    try:
        model = TypeAdapter(kind.model_schema).validate_python(metadata["model"])
        task = kind.config.model_validate(with_added("task", metadata["task"], kind.config.model_fields))
    except ValidationError as error:
        raise wrong_metadata(path, key, error) from None
    facts = {name: metadata[name] for name in kind.fact_names if name in metadata}
    if missing := [name for name in kind.fact_names if name not in facts]:
        raise UserError(f"{key}: {path} names no {', '.join(missing)} in its metadata; make the file again")
    return kind, Setup(model, task, metadata.get("preprocessing", {}), facts)


def _split(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a weight file's tensors by exported network, under the network's own names."""
    networks = task.exported().networks
    if len(networks) == 1:
        return {networks[0]: dict(tensors)}
    return {
        network: {
            name.removeprefix(f"{network}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{network}.")
        }
        for network in networks
    }
