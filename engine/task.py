"""The contract between a kind of training and the engine.

A task is an nn.Module that owns its networks and all other state (a teacher, frozen encoders, a running centre). DDP
and FSDP therefore wrap the task, compile sees forward and loss in one graph, and its state is checkpointed with it. Its
networks run stacked blocks by calling them: FSDP all-gathers a block's weights in its forward call
(engine/parallel.py).

    task(batch, progress) -> StepOutput       one loss per sample
    task.roles                                which networks are trained, averaged, frozen
    task.initialise(source)                   initial weights from `init_from`
    task.exported, task.metadata              what weight files and exports hold, and what is judged best
    task.after_step(step, progress, applied)  optional: a teacher's update
    task.evaluate(loaders, step) -> Report    exact over ranks
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from utils.contracts import Batch
from utils.errors import UserError
from utils.io.memo import hash_once
from utils.io.weights import InitFrom

FILE_HASHES = Path("outputs/cache/file_hashes.jsonl")


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


@dataclass(frozen=True)
class Roles:
    """What each network of a task is for. Names are dotted, such as `vae.decoder`.

    trained: networks that receive gradients.
    averaged: networks whose weights are averaged where `loop.ema_decay` is set, and where the average is kept.
    frozen: networks that are never trained and never checkpointed. `load_frozen` makes them at every start; they are
        compared by fingerprint on resume.
    passed: frozen networks that gradients pass through, such as a U-Net beside a LoRA; gradient checkpointing is for
        them, too.

    A network in none of these, such as an EMA teacher, is checkpointed but gets no gradient.
    """

    trained: tuple[str, ...] = ("network",)
    averaged: Mapping[str, Literal["device", "cpu"]] = field(default_factory=lambda: {"network": "device"})
    frozen: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


class Task(nn.Module):
    """Base of all tasks: the names that the engine uses, and defaults for what is optional.

    best_metric: the scalar of a report that decides which weights are best; `best_is_lowest` is its direction.
    exported: names of the networks that weight files and exports hold. The tensors of a single one keep their own names
    in a file; those of several are prefixed with the network's. metadata: of the files (JSON values).
    origin: what is known of the weights that training began with, such as their licence (JSON values), or None. It is
    checkpointed and written into weight files.
    """

    best_metric: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True
    roles: Roles = Roles()
    exported: tuple[str, ...] = ("network",)
    metadata: Mapping[str, Any] = {}
    origin: dict[str, Any] | None = None

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return one loss per sample.

        progress: the share of the run, a device scalar: 0 at the first update, 1 at the last. A value of the task that
        moves follows it by a curve of optim/schedules.py.
        """
        raise NotImplementedError

    def load_frozen(self) -> None:
        """Set the frozen networks, None before; called at every start and rebuild, never on the meta device."""

    def frozen_files(self) -> Mapping[str, Sequence[Path]]:
        """Return the files that frozen networks were loaded from, by network; one without files has its own tensors."""
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
        """Set the mode of all networks but the frozen ones, which stay in eval mode."""
        super().train(mode)
        for network in frozen_networks(self).values():
            network.eval()
        return self


def _find_network(task: Task, name: str) -> nn.Module | None:
    """Return a network by its dotted name; None where the task holds its place. Raises ValueError for another name."""
    owner, _, last = name.rpartition(".")
    network = getattr(task.get_submodule(owner), last, "") if owner in dict(task.named_modules()) else ""
    if network is not None and not isinstance(network, nn.Module):
        raise ValueError(f"{type(task).__name__}.roles: {name!r} is none of the task's networks")
    return network


def frozen_networks(task: Task) -> dict[str, nn.Module]:
    """Return the frozen networks by name; one that is not loaded, as in a dry run, is None in the task."""
    found = {name: _find_network(task, name) for name in task.roles.frozen}
    return {name: network for name, network in found.items() if network is not None}


def freeze(task: Task) -> None:
    """Turn off the gradients of the frozen networks."""
    for network in frozen_networks(task).values():
        network.requires_grad_(False)


def trained_networks(task: Task) -> dict[str, nn.Module]:
    """Return the networks that receive gradients, by name."""
    found = {name: _find_network(task, name) for name in task.roles.trained}
    assert None not in found.values(), f"networks that are trained, and not built: {found}"
    return found


def checkpointed_state(task: Task) -> dict[str, Tensor]:
    """Return the task's state without its frozen networks."""
    frozen = tuple(f"{name}." for name in task.roles.frozen)
    return {name: tensor for name, tensor in task.state_dict().items() if not name.startswith(frozen)}


def split_exported(task: Task, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split tensors by full name into those of a weight file, under the file's names, and the rest."""
    networks = task.exported
    exported, rest = {}, {}
    for name, tensor in tensors.items():
        network = next((network for network in networks if name.startswith(f"{network}.")), None)
        if network is None:
            rest[name] = tensor
        else:
            exported[name.removeprefix(f"{network}.") if len(networks) == 1 else name] = tensor
    return exported, rest


def join_exported(task: Task, exported: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `split_exported`."""
    networks = task.exported
    prefix = f"{networks[0]}." if len(networks) == 1 else ""
    return {f"{prefix}{name}": tensor for name, tensor in exported.items()} | dict(rest)


def exports_average(task: Task) -> bool:
    """Return whether all exported networks are averaged, so that their average is what is judged and exported."""
    return set(task.exported) <= set(task.roles.averaged)


def fingerprint_frozen(task: Task) -> dict[str, str]:
    """Return a hash of each frozen network by name: of its files, or else of its tensors' names, shapes and bytes."""
    fingerprints, files = {}, task.frozen_files()
    for network, module in frozen_networks(task).items():
        digest = hashlib.sha256()
        if network in files:
            for path in files[network]:
                digest.update(f"{path.name} {hash_once(path, FILE_HASHES)}\n".encode())
            fingerprints[network] = digest.hexdigest()[:16]
            continue
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        fingerprints[network] = digest.hexdigest()[:16]
    return fingerprints


@torch.no_grad()
def log_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of per-sample values [B] under the batch's weights [B], ignoring samples of weight 0."""
    kept = torch.where(weight > 0, values.detach().float() * weight, 0.0)
    return kept.sum(), weight.sum()
