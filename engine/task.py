"""The contract between a kind of training and the engine.

A task is an nn.Module that owns its network and whatever else is state (a teacher, frozen encoders, running centres),
so that DDP wraps it, compile sees forward and loss in one graph, and its state is checkpointed with it. It is the only
thing that a new kind of training writes. Its networks enter their stacked blocks by calling them, which is where ranks
that share a block's rows bring them together (engine/parallel.py).

    task(batch, knobs) -> StepOutput          one loss per sample
    task.network                              what EMA follows and export writes
    task.after_step(step, knobs, applied)     optional: a teacher's update
    task.evaluate(loaders, step) -> Report    exact over ranks
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError

Batch = dict[str, Tensor]
Knobs = dict[str, Tensor]


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
    """What an evaluation found: figures on every rank; on rank 0 also tables, as rows of equal keys, and pictures.

    A row's None is an empty cell; an image is [H, W, 3] uint8. Other ranks may leave both out.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class Task(nn.Module):
    """Base of all tasks: the names that the engine uses, and what is optional.

    `knob_names` are the scheduled values that the task reads (schedule.knobs must give exactly these).
    `best_metric` names the scalar that decides which weights are best, `best_is_lowest` its direction.
    """

    knob_names: ClassVar[frozenset[str]] = frozenset()
    best_metric: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True
    network: nn.Module

    def forward(self, batch: Batch, knobs: Knobs) -> StepOutput:
        """Return one loss per sample."""
        raise NotImplementedError

    def after_step(self, step: int, knobs: Knobs, applied: Tensor) -> None:
        """Update what follows the network; `applied` is a device scalar, 0 where the step was left out."""

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Measure on the loaders' samples, exact over ranks. Called on every rank, in eval mode, without gradients."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Return what a weight file must say to be used alone: preprocessing, class names (JSON values)."""
        return {}


def mean_over_readable(total: float, count: float) -> float:
    """Return an evaluation's mean. Raises UserError where no image of the validation split could be read."""
    if count == 0:
        raise UserError("data.root: no image of the validation split could be read; see the warnings above")
    return total / count


@torch.no_grad()
def log_mean(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of per-sample values [B] under the batch's weights [B], ignoring samples of weight 0."""
    kept = torch.where(weight > 0, values.detach().float() * weight, 0.0)
    return kept.sum(), weight.sum()
