"""The contract between a kind of training and the engine.

A task is an nn.Module that owns its networks and all other state (a teacher, frozen encoders, a running centre). DDP
and FSDP therefore wrap the task, compile sees forward and loss in one graph, and its state is checkpointed with it. Its
networks run stacked blocks by calling them: FSDP all-gathers a block's weights in its forward call
(engine/parallel.py).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from utils.contracts import Batch, TrainStream
from utils.errors import UserError
from utils.io.memo import hash_once
from utils.io.weights import InitFrom

FILE_HASHES = Path("outputs/cache/file_hashes.jsonl")


@dataclass(frozen=True)
class Streams:
    """The data of a run.

    fingerprints: what must not change while a run is resumed, by configuration key, such as the collection's content.
    every_epochs: for evaluation loaders that not every evaluation needs (a probe), the epochs between two uses. The
        first evaluation at or after each multiple uses them, and so does that of the run's last step.
    described: lines of the first screen, such as `collection` and `images`.
    """

    train: TrainStream
    evaluation: Mapping[str, Iterable[Batch]]
    fingerprints: Mapping[str, str]
    every_epochs: Mapping[str, float] = field(default_factory=dict)
    described: Mapping[str, str] = field(default_factory=dict)

    @property
    def evaluation_samples(self) -> int:
        """Samples that every evaluation reads, of the loaders that say how many they have."""
        every = [loader for name, loader in self.evaluation.items() if name not in self.every_epochs]
        return sum(getattr(loader, "samples", 0) for loader in every)


@dataclass
class StepOutput:
    """What a forward pass returns.

    loss: [B] float32, one per sample; a loss that couples the batch gives every sample its mean.
    logs: detached scalars as (sum, count), so that means are exact over micro-batches and ranks.
    """

    loss: Tensor
    logs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class Report:
    """The result of an evaluation: scalars on every rank; on rank 0 also tables (rows with equal keys) and images.

    A None in a table row is an empty cell; an image is [H, W, 3] uint8. Other ranks may leave tables and images empty.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class Task(nn.Module):
    """Base of all tasks: the names that the engine uses, and defaults for what is optional.

    Networks are named with dots, such as `vae.decoder`. One that is in no list, such as an EMA teacher, is checkpointed
    but gets no gradient.

    trained: networks that receive gradients.
    averaged: networks whose weights are averaged where `loop.ema_decay` is set, and where the average is kept.
    helpers: networks that are frozen and never checkpointed, such as a teacher or the base of a LoRA. `load_helpers`
        makes them at every start; they are compared by fingerprint on resume.
    exported: networks that weight files and exports hold. The tensors of a single one keep their own names in a file;
        those of several are prefixed with the network's. metadata: of the files (JSON values).
    best_metric: the scalar of a report that decides which weights are best; `best_is_lowest` is its direction.
    origin: what is known of the weights that training began with, such as their licence (JSON values), or None. It is
        checkpointed and written into weight files.
    """

    trained: tuple[str, ...] = ("network",)
    averaged: Mapping[str, Literal["device", "cpu"]] = {"network": "device"}
    helpers: tuple[str, ...] = ()
    exported: tuple[str, ...] = ("network",)
    metadata: Mapping[str, Any] = {}
    best_metric: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True
    origin: dict[str, Any] | None = None

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return one loss per sample.

        progress: the share of the run, a device scalar: 0 at the first update, 1 at the last. A value of the task that
        moves follows it by a curve of optim/schedules.py.
        """
        raise NotImplementedError

    def load_helpers(self) -> None:
        """Set the helpers, None before; called at every start and rebuild, never on the meta device."""

    def helper_files(self) -> Mapping[str, Sequence[Path]]:
        """Return the files that helpers were loaded from, by network; one without files has its own tensors."""
        return {}

    def initialise(self, source: InitFrom | None) -> None:
        """Load initial weights (`init_from`) and set `origin`; called on a new run, not on resume.

        A task that keeps a copy of its network (a teacher) copies it again here. None keeps the drawn weights.
        """
        if source is not None:
            raise UserError(f"init_from: {type(self).__name__} loads no weights; set init_from=null")

    def after_step(self, step: int, progress: Tensor, applied: Tensor) -> None:
        """Update what follows the network; `applied` is a device scalar, 0 where the step was skipped."""

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure on the loaders' samples, exact over ranks. Called on every rank, in eval mode, without gradients."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all networks but the helpers, which stay frozen and in eval mode."""
        super().train(mode)
        for network in networks_of(self, self.helpers).values():
            network.eval().requires_grad_(False)
        return self


def networks_of(task: Task, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return networks by name, without helpers that are not loaded. Raises AttributeError for a wrong name."""
    found = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if (network := getattr(task.get_submodule(owner), last)) is not None:
            found[name] = network
    return found


def checkpointed_state(task: Task) -> dict[str, Tensor]:
    """Return the task's state without its helpers."""
    helpers = tuple(f"{name}." for name in task.helpers)
    return {name: tensor for name, tensor in task.state_dict().items() if not name.startswith(helpers)}


def split_exported(task: Task, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split tensors by full name into those of a weight file, under the file's names, and the rest."""
    networks = tuple(f"{name}." for name in task.exported)
    prefix = networks[0] if len(networks) == 1 else ""
    exported = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(networks)}
    return exported, {name: tensor for name, tensor in tensors.items() if not name.startswith(networks)}


def join_exported(task: Task, exported: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `split_exported`."""
    networks = task.exported
    prefix = f"{networks[0]}." if len(networks) == 1 else ""
    return {f"{prefix}{name}": tensor for name, tensor in exported.items()} | dict(rest)


def fingerprint_helpers(task: Task) -> dict[str, str]:
    """Return a hash of each helper by name: of its files, or else of its tensors' names, shapes and bytes."""
    fingerprints, files = {}, task.helper_files()
    for network, module in networks_of(task, task.helpers).items():
        digest = hashlib.sha256()
        for path in files.get(network, ()):
            digest.update(f"{path.name} {hash_once(path, FILE_HASHES)}\n".encode())
        for name, tensor in () if network in files else sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        fingerprints[network] = digest.hexdigest()[:16]
    return fingerprints


@torch.no_grad()
def log_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of per-sample values [B] under the batch's weights [B], ignoring samples of weight 0."""
    kept = torch.where(weight > 0, values.detach().float() * weight, 0.0)
    return kept.sum(), weight.sum()
