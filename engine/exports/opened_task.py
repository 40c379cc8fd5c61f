"""Rebuild a task from a weight file alone. Its metadata state the kind, network, preprocessing and facts.

The file may come from a stranger, so its metadata are checked and compared with the shapes of its tensors before any
network is allocated.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.exports.config import MovedBase
from engine.task import Task, Use, fingerprint_helpers, join_exported
from engine.tasks.kind import Kind, Setup
from engine.tasks.opening import read_setup
from models.image_model import ImageModel, torch_predictor
from models.interop.metadata import dict_of
from models.predictor import Predictor
from utils.contracts import InitFrom
from utils.errors import UserError
from utils.io.files import Json
from utils.io.weights import read_weights
from utils.record.run_reader import RunReader, run_of


@dataclass(frozen=True)
class OpenedTask:
    """A task with the weights of a file. A network without a file has no task, kind or setup."""

    path: Path
    model: ImageModel | None  # from images to outputs; None if the task has no output for a single image
    whole: nn.Module | None  # the complete network, such as an FCMAE with its decoder
    metadata: Json  # from the file, with `output`
    kind: Kind | None = None
    task: Task | None = None  # in eval mode
    setup: Setup | None = None

    @property
    def run(self) -> RunReader | None:
        """The run whose folder the file is in; None for a file elsewhere."""
        return run_of(self.path)

    @property
    def subject(self) -> str:
        """The subject of a format of export.py: the name of the output, or of a task without outputs."""
        return self.metadata["output"] or self.setup.task.name

    @property
    def title(self) -> str:
        """The name of exports: the name of the run folder, or else of the file."""
        return self.path.stem if self.run is None else self.run.path.name

    def check_helpers(self) -> None:
        """Raise UserError unless the run was trained with the loaded helpers."""
        saved = self.metadata.get("frozen", {})
        wrong = [name for name, value in fingerprint_helpers(self.task).items() if saved.get(name) != value]
        if wrong:
            names = ", ".join(wrong)
            raise UserError(
                f"{self.path} was trained with another frozen {names}; restore it, or set model.path or model.vae"
            )


def open_task(
    path: Path,
    use: Use = "export",
    base: MovedBase | None = None,
    *,
    needs_output: bool = False,
    graph: Predictor | None = None,
) -> OpenedTask:
    """Rebuild the task of a weight file, with the helpers that `use` needs. base: new paths of the base model.

    graph: the file, if it is an ONNX file of classes or tags; it is the network of the task.
    needs_output: refuse a task without an output for a single image, before large files are read. Raises UserError
    for a file that Atelier did not write, or for helpers that the run was not trained with.
    """
    moved = {} if base is None else base.model_dump(exclude_none=True)
    kind, setup, metadata = read_setup(path, moved, graph)
    if needs_output and kind.output is None:
        raise UserError(
            f"{path} is of task {setup.task.name!r}, which has no output for a single image; use evaluate.py"
        )
    task = kind.build(setup)
    if graph is not None:
        return OpenedTask(path, None, None, metadata, kind, task.eval(), setup)
    task.load_helpers(use)
    if "form" in metadata:  # a tagger of others
        task.initialise(InitFrom(str(path), "model"))
        metadata |= {"weights_hash": task.origin["weights_hash"], "origin": task.origin}
    else:
        task.load_state_dict(join_exported(task, read_weights(path)[0]), strict=False)
    task.eval()
    task.origin = dict_of(metadata, "origin") or None
    metadata |= {"output": kind.output}
    model = whole = None
    if kind.output is not None:
        model = ImageModel(task.get_submodule(kind.network), setup.normalise(), kind.output).eval()
        whole = task.get_submodule(task.exported[0])
    weights = OpenedTask(path, model, whole, metadata, kind, task, setup)
    weights.check_helpers()
    return weights


def open_predictor(path: Path, device: torch.device | str) -> Predictor:
    """Return the predictor of a weight file. Raises UserError."""
    weights = open_task(path, needs_output=True)
    return torch_predictor(weights.model, weights.metadata, torch.device(device))
