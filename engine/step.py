"""The parts of an update (engine/learner.py): one micro-batch, the sums over ranks, clipping, the loss scale of fp16.

The loss of an update is the weighted mean over all samples of all ranks and micro-batches. The ranks sum the weights
before the first backward pass, so accumulation and uneven weights are exact. All ranks skip an update together if it is
not finite or has no weight; this is decided on the device, and a skipped update leaves every tensor unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.runtime import Runtime
from utils.contracts import Batch
from utils.ranks import distributed

GROWTH_STEPS = 2000  # finite updates before the loss scale is doubled

Sums = dict[str, tuple[Tensor, Tensor]]  # (sum, count) by log name
# Of one micro-batch, detached: the weighted loss sum and the logs (float64 [1 + 2 N]), N sorted log names, losses [B].
MicroStep = tuple[Tensor, list[str], Tensor]


@dataclass
class StepResult:
    """Device scalars of one update, equal on all ranks."""

    sums: Sums  # over all samples, float64; 0 if skipped
    grad_norm: Tensor
    applied: Tensor  # 0 if the update was skipped, else 1
    weight: Tensor  # sum of the samples' weights; 0 (no image could be read) skips the update
    losses: Sequence[Tensor] = ()  # [B] of each micro-batch of this rank, detached

    @cached_property
    def figures(self) -> tuple[tuple[str, ...], Tensor]:
        """Return sorted names, and their (sum, count) as one tensor [N, 2], float64."""
        pairs = self.sums | {
            "grad_norm": (self.grad_norm, self.applied),
            "skipped_steps": (1.0 - self.applied, torch.ones_like(self.applied)),
        }
        names = tuple(sorted(pairs))
        return names, torch.stack([part for name in names for part in pairs[name]]).double().view(-1, 2)


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum over micro-batches, or the tensor itself if there is one."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(dim=0)


def forward_backward(model: nn.Module, batch: Batch, progress: Tensor, factor: Tensor, runtime: Runtime) -> MicroStep:
    """Run one micro-batch with its gradient times `factor`."""
    with runtime.autocast():
        output = model(batch, progress)
    weight = batch["weight"]
    assert output.loss.shape == weight.shape, f"loss {tuple(output.loss.shape)}, weights {tuple(weight.shape)}"
    # Select, do not multiply: the loss of a blank sample may be NaN.
    weighted = torch.where(weight > 0, output.loss.float() * weight, 0.0).sum()
    (weighted * factor).backward()
    names = sorted(output.logs)
    parts = [weighted.detach(), *(part for name in names for part in output.logs[name])]
    # stack would promote float32 and an integer to float32, which is too narrow.
    figures = torch.stack([part if part.dtype == torch.float32 else part.double() for part in parts]).double()
    return figures, names, output.loss.detach()


def reduce_figures(
    figures: Tensor, names: Sequence[str], weight: Tensor, norm: Tensor, *, rows_only: bool
) -> tuple[Sums, Tensor, Tensor]:
    """Sum figures over ranks in one collective. Return (sums, gradient norm, skip).

    figures: the loss, then the logs. rows_only: `norm` covers only this rank's rows (fsdp).
    """
    total = F.pad(figures, (1, 1 if rows_only else 0))
    # In float64, the sum of two float32 values is finite only if both are.
    total[0] = ~torch.isfinite(norm + figures[0])
    if rows_only:
        total[-1] = norm.double().square()
    total = distributed.all_reduce_sum(total)
    bad = (total[0] > 0) | (weight == 0)
    kept = torch.where(bad, 0.0, total).unbind()
    sums = {"loss": (kept[1], torch.where(bad, 0.0, weight.double()))}
    sums |= dict(zip(names, zip(kept[2::2], kept[3::2])))
    if rows_only:
        norm = kept[-1].sqrt().to(norm.dtype)
    return sums, norm, bad


def clip_gradients(grads: list[Tensor], norm: Tensor, limit: float | None, inverse_scale: Tensor | None) -> None:
    """Undo the loss scale and clip the gradients, without a host synchronisation."""
    factor = inverse_scale
    if limit is not None:
        shrink = (limit / (norm + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        torch._foreach_mul_(grads, factor)


def first_scale(runtime: Runtime) -> dict[str, Tensor]:
    """Return the loss scale at step 0, which is 1 except in fp16, and the count of finite updates."""
    scale = torch.full((), 65536.0 if runtime.precision == "fp16" else 1.0, device=runtime.device)
    return {"scale": scale, "good_steps": torch.zeros((), device=runtime.device)}


def next_scale(before: dict[str, Tensor], applied: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the scale: doubled after GROWTH_STEPS finite updates, halved after another, kept without weight."""
    good_steps = (before["good_steps"] + 1) * applied
    grow = good_steps >= GROWTH_STEPS
    scale = torch.where(applied == 0, before["scale"] / 2, torch.where(grow, before["scale"] * 2, before["scale"]))
    after = {"scale": scale, "good_steps": torch.where(grow, 0.0, good_steps)}
    return {name: torch.where(weight == 0, before[name], tensor) for name, tensor in after.items()}
