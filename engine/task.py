"""The interface between a task and the engine.

A task is an nn.Module that owns its networks and all other state (a teacher, frozen encoders, a running centre). DDP
therefore wraps the task, torch.compile sees forward pass and loss in one graph, and checkpoints hold all state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from utils.contracts import Batch, Figures, InitFrom, State, StepStream, Tensors
from utils.errors import UserError
from utils.io.files import Json, Values, sha256_text
from utils.io.memo import hash_once
from utils.io.weights import hash_tensors

Use = Literal["training", "evaluation", "export"]
Loaders = dict[str, Iterable[Batch]]  # of an evaluation, by name
COMPARED = "trained"  # a loader of training images that pictures are compared with; the plan of a run ignores it
FILE_HASHES = Path("outputs/cache/file_hashes.jsonl")
IMAGE_HASHES = Path("outputs/cache/image_hashes.jsonl")


@dataclass(frozen=True)
class Streams:
    """The data of a run.

    fingerprints: hashes by configuration key that must not change on resume, such as the content of the collection.
    every_epochs: for loaders that some evaluations skip (a probe), the epochs between two uses. The first evaluation at
        or after a multiple uses the loader, and so does the last evaluation.
    described: lines of the start screen, such as `collection` and `images`.
    trained_on: facts about the training images for weight files, JSON values.
    earlier: the training streams of `loop.phases`, which come before `train`.
    tables: functions that return the rows of a dry run's tables, by name.
    findings: what speaks against the figures of the run, the most serious first: `weight`, `key`, `line`, `mark`.
    """

    train: StepStream
    evaluation: Loaders
    fingerprints: Mapping[str, str]
    every_epochs: Figures = field(default_factory=dict)
    described: Mapping[str, str] = field(default_factory=dict)
    trained_on: Values = field(default_factory=dict)
    earlier: Sequence[StepStream] = ()
    tables: Mapping[str, Callable[[], list[Json]]] = field(default_factory=dict)
    findings: Sequence[Values] = ()

    @property
    def in_order(self) -> list[StepStream]:
        """The training streams: the streams of `loop.phases`, then `train`."""
        return [*self.earlier, self.train]

    @property
    def evaluation_samples(self) -> int:
        """The number of samples of `val`; 0: there is no validation image."""
        return getattr(self.evaluation.get("val"), "samples", 0)


@dataclass(frozen=True)
class Finish:
    """A function that completes the exported weights on all ranks, after the last update and before its evaluation.

    The initial weights are complete, too; they are evaluated and may be the best. complete: its argument is the epochs
    of the run. seconds: about its time. images: that it reads.
    """

    complete: Callable[[float], None]
    seconds: float
    images: int


@dataclass
class StepOutput:
    """The output of a forward pass."""

    loss: Tensor  # [B] float32; a loss over the whole batch gives every sample its mean
    logs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # detached (sum, count), for exact means


@dataclass
class Report:
    """The result of an evaluation. Only rank 0 needs tables and images.

    An image that takes time to draw is a function: training calls it within its time for pictures.
    """

    scalars: Figures = field(default_factory=dict)
    tables: dict[str, list[Json]] = field(default_factory=dict)  # rows with equal keys; None: an empty cell
    images: dict[str, np.ndarray | Callable[[], np.ndarray]] = field(default_factory=dict)  # [H, W, 3] uint8

    def draw(self) -> dict[str, np.ndarray]:
        """Return the images, and draw the images that are functions."""
        return {name: image() if callable(image) else image for name, image in self.images.items()}


class Task(nn.Module):
    """Base class of all tasks.

    Names of networks have dots, such as `vae.decoder`. A network in no list, such as an EMA teacher, is checkpointed,
    but gets no gradient.

    trained: networks that receive gradients.
    averaged: networks whose weights are averaged if `loop.ema_decay` is set.
    helpers: networks that are frozen and never checkpointed, such as the base of a LoRA. `load_helpers`
        creates them; their fingerprints must not change during a run.
    offloaded: helpers that `runtime.offload` keeps on the host; the task brings them to the device (`visiting`).
    exported: the networks in weight files and exports. In a file, tensors are prefixed with the network's name if there
        are several networks.
    metadata: JSON values for weight files.
    best_metric, best_is_lowest: the scalar of a report that selects the best weights, and its direction.
    best_needs: with fewer validation images, no weights count as the best, unless `loop.best` names a figure.
    may_be_recorded: whether an update depends on tensors alone and does not wait for the GPU (engine/update/graphs.py).
    origin: JSON values about the initial weights, such as their licence, for checkpoints and weight files.
    """

    trained: tuple[str, ...] = ("network",)
    averaged: tuple[str, ...] = ("network",)
    helpers: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    exported: tuple[str, ...] = ("network",)
    metadata: Values = {}
    best_metric: str = "loss"
    best_is_lowest: bool = True
    best_needs: int = 0
    may_be_recorded: bool = False
    origin: Json | None = None

    def choose_best(self, metric: str | None) -> None:
        """Let `best_metric` select the best weights with any number of validation images (`loop.best`).

        Raises UserError (`loop.best`) for another figure.
        """
        if metric is None:
            return
        if metric != self.best_metric:
            raise UserError(f"loop.best: {metric} is no figure that chooses weights here; set {self.best_metric}")
        self.best_needs = 0

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return one loss per sample.

        progress: a device scalar, 0 at the first update and 1 at the last. A task's own schedules follow it by a curve
        of optim/schedules.py.
        """
        raise NotImplementedError

    def load_helpers(self, use: Use) -> None:
        """Set the helpers that a use needs; other helpers stay None. Not called on the meta device.

        use: `training`, at every start, needs all helpers; `evaluation` needs the helpers that `evaluate` reads;
        `export` (and predict.py) needs the helpers without which the exported networks have no outputs.
        """

    def helper_files(self) -> Mapping[str, Sequence[Path]]:
        """Return the files of helpers that were loaded from files."""
        return {}

    def initialise(self, source: InitFrom | None) -> None:
        """Load initial weights (`init_from`; None keeps the random ones) and set `origin`. Not called on resume.

        A task that keeps a copy of its network (a teacher) must copy it again here.
        """
        if source is not None:
            raise UserError(f"init_from: {type(self).__name__} loads no weights; set init_from=null")

    def write_beside(self, path: Path, metadata: Json) -> None:
        """Write a file for other programs beside the weight file `path` of this moment's weights, with its metadata."""

    def after_step(self, step: int, progress: Tensor, applied: Tensor) -> None:
        """Update other state, such as an EMA teacher. applied: a device scalar, 0 if the step was skipped."""

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Evaluate on the loaders, exactly over ranks. Called on every rank, in eval mode, without gradients."""
        raise NotImplementedError

    def describe_images(self, batch: Batch) -> pa.Table:
        """Return a row for each sample of a batch, with its `loss`, for evaluate.py per_image=true."""
        return pa.table({"loss": self.forward(batch, torch.ones(())).loss.float().cpu().numpy()})

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return a batch's images as the networks see them, [B, C, H, W] from 0 to 255, and a text for each sample."""
        return batch["images"], [""] * len(batch["weight"])

    def draw(self) -> Report:
        """Return what an evaluation measures without validation images, such as pictures of prompts."""
        return Report()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all networks except the helpers, which stay frozen and in eval mode."""
        super().train(mode)
        for network in networks_of(self, self.helpers).values():
            network.eval().requires_grad_(False)
        return self


def networks_of(task: Task, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return networks by name, without helpers that are not loaded. Raises AttributeError for a wrong name."""
    networks = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if (network := getattr(task.get_submodule(owner), last)) is not None:
            networks[name] = network
    return networks


@contextmanager
def visiting(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Bring networks without gradients to a device inside the context, if they are elsewhere."""
    module = nn.ModuleList(networks)
    moved = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers()) if tensor.device != device]
    for tensor, values in moved:
        tensor.data = values.to(device)
    try:
        yield
    finally:
        for tensor, values in moved:
            tensor.data = values


def checkpointed_state(task: Task) -> State:
    """Return the task's state without its helpers."""
    helpers = tuple(f"{name}." for name in task.helpers)
    return {name: tensor for name, tensor in task.state_dict().items() if not name.startswith(helpers)}


def split_exported(task: Task, tensors: Tensors) -> tuple[State, State]:
    """Split tensors by full name into the exported ones, renamed as in weight files, and the rest."""
    networks = tuple(f"{name}." for name in task.exported)
    prefix = networks[0] if len(networks) == 1 else ""
    exported = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(networks)}
    return exported, {name: tensor for name, tensor in tensors.items() if not name.startswith(networks)}


def join_exported(task: Task, exported: Tensors) -> State:
    """Return the tensors of a weight file by their full names."""
    networks = task.exported
    prefix = f"{networks[0]}." if len(networks) == 1 else ""
    return {f"{prefix}{name}": tensor for name, tensor in exported.items()}


def fingerprint_helpers(task: Task) -> dict[str, str]:
    """Return a hash of each loaded helper: of its files, or else of its tensors."""
    files = task.helper_files()
    hashes = {}
    for name, network in networks_of(task, task.helpers).items():
        if name in files:
            hashes[name] = sha256_text("".join(f"{hash_once(path, FILE_HASHES)}\n" for path in files[name]))[:16]
        else:
            hashes[name] = hash_tensors(network.state_dict())[:16]
    return hashes


@torch.no_grad()
def log_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of per-sample values [B] under the batch's weights [B], ignoring samples of weight 0."""
    return torch.where(weight > 0, values.detach().float() * weight, 0.0).sum(), weight.sum()
