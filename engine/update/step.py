"""The parts of an update (learner.py): one micro-batch, the sums over ranks, clipping, the loss scale of fp16.

The loss of an update is the weighted mean over all samples of all ranks and micro-batches. The ranks sum the weights
before the first backward pass, so accumulation and uneven weights are exact. All ranks skip an update together if it is
not finite or has no weight; this is decided on the device, and a skipped update leaves every tensor unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.task import StepOutput
from engine.update.runtime import Runtime
from utils.contracts import State
from utils.ranks import distributed

GROWTH_STEPS = 2000  # finite updates before the loss scale is doubled

# Of one micro-batch, detached: (sum, count) pairs float64 [2 N], the loss first; their names; losses [B].
MicroStep = tuple[Tensor, tuple[str, ...], Tensor]
Begin = Callable[[Tensor, Tensor], None]  # takes the weighted loss and the sum of weights


@dataclass
class StepResult:
    """One update: device tensors, equal on all ranks but for `losses`."""

    names: tuple[str, ...]
    figures: Tensor  # [N, 2] float64: (sum, count) over all samples, by name; 0 if skipped, but for `skipped_steps`
    applied: Tensor  # 0 if the update was skipped, else 1
    weight: Tensor  # sum of the samples' weights; 0 (no image could be read) skips the update
    losses: Sequence[Tensor]  # [B] of each micro-batch of this rank, detached

    @property
    def sums(self) -> State:
        """The (sum, count) of each figure."""
        return dict(zip(self.names, self.figures))

    def clone(self) -> "StepResult":
        """Return a copy, which the next replay of a graph does not overwrite."""
        losses = [each.clone() for each in self.losses]
        return StepResult(self.names, self.figures.clone(), self.applied.clone(), self.weight.clone(), losses)


def backward(output: StepOutput, weight: Tensor, factor: Tensor, begin: Begin | None = None) -> MicroStep:
    """Run the backward pass of one micro-batch, of its weighted loss times `factor`. begin: called before it."""
    assert output.loss.shape == weight.shape, f"loss {tuple(output.loss.shape)}, weights {tuple(weight.shape)}"
    # Select, do not multiply: the loss of a blank sample may be NaN.
    weighted = torch.where(weight > 0, output.loss.float() * weight, 0.0).sum()
    if begin is not None:
        begin(weighted.detach(), weight.sum())
    (weighted * factor).backward()
    names = sorted(output.logs)
    parts = [weighted.detach(), weight.sum(), *(part for name in names for part in output.logs[name])]
    # stack would promote float32 and an integer to float32, which is too narrow.
    figures = torch.stack([part if part.dtype == torch.float32 else part.double() for part in parts]).double()
    return figures, ("loss", *names), output.loss.detach()


def reduce_figures(figures: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum figures over ranks in one collective. Return (figures, gradient norm, skip)."""
    total = F.pad(figures, (1, 0))
    # In float64, the sum of two float32 values is finite only if both are.
    total[0] = ~torch.isfinite(norm + figures[0])
    total = distributed.all_reduce_sum(total)
    bad = (total[0] > 0) | (weight == 0)
    total, norm = (torch.where(bad, 0.0, values) for values in (total, norm))
    return total[1:], norm, bad


def first_scale(runtime: Runtime) -> State:
    """Return the loss scale at step 0, which is 1 except in fp16, and the count of finite updates."""
    scale = torch.full((), 65536.0 if runtime.precision == "fp16" else 1.0, device=runtime.device)
    return {"scale": scale, "good_steps": torch.zeros((), device=runtime.device)}


def next_scale(before: State, applied: Tensor, weight: Tensor) -> State:
    """Return the scale: doubled after GROWTH_STEPS finite updates, halved after another, kept without weight."""
    good_steps = (before["good_steps"] + 1) * applied
    grow = good_steps >= GROWTH_STEPS
    scale = torch.where(applied == 0, before["scale"] / 2, torch.where(grow, before["scale"] * 2, before["scale"]))
    after = {"scale": scale, "good_steps": torch.where(grow, 0.0, good_steps)}
    return {name: torch.where(weight == 0, before[name], tensor) for name, tensor in after.items()}
