"""train_step: the forward pass, backward pass, gradient clipping and optimiser step of every task.

The loss of a step is the weighted mean over all samples of all ranks and micro-batches. The ranks sum the weights
before the first backward pass, so accumulation and uneven weights are exact. All ranks skip a step together if it is
not finite or has no weight; this is decided on the device, and a skipped step leaves every tensor unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batch_size import OutOfMemory
from engine.parallel import no_sync, take_gradients
from engine.runtime import Runtime
from engine.task import StepOutput, Task, checkpointed_state
from optim.build import skips_on_device
from optim.groups import drop_frozen_gradients
from optim.vectors import flat_view
from utils import rng
from utils.contracts import Batch
from utils.ranks import distributed
from utils.ranks.sharded import Part


class Asks(NamedTuple):
    """Requests of a rank: end the run after this step, or save a checkpoint."""

    stop: bool = False
    save: bool = False


NOTHING = Asks()


class Stopped(Exception):
    """All ranks end the run after this step; the same command resumes it."""


class Vote:
    """Read the requests of all ranks without waiting for the GPU, so that all stop or save at the same step."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, asked: Tensor, asks: Asks) -> Asks:
        """Return the requests of any rank at this step, or on GPUs at the previous step. asks: this process's."""
        if not distributed.is_distributed():
            return asks
        counts: Tensor | None = asked
        if asked.device.type == "cuda":
            counts, copy = None, torch.empty(2, dtype=asked.dtype, pin_memory=True)
            if self._pending is not None:
                counts, event = self._pending
                event.synchronize()
            self._pending = copy.copy_(asked, non_blocking=True), torch.cuda.Event()
            self._pending[1].record()
        return NOTHING if counts is None else Asks(*(count > 0 for count in counts.tolist()))


@dataclass
class StepResult:
    """Device scalars of one step, equal on all ranks."""

    sums: dict[str, tuple[Tensor, Tensor]]  # (sum, count) by log name over all samples, float64; 0 if skipped
    grad_norm: Tensor
    applied: Tensor  # 0 if the step was skipped, else 1
    asked: Tensor  # [2]: the number of ranks that ask to stop, and to save
    weight: Tensor  # sum of the samples' weights; 0 (no image could be read) skips the step
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


class LossScale(nn.Module):
    """The dynamic loss scale of fp16: doubled after 2,000 finite steps, halved after a non-finite one; otherwise 1."""

    growth_interval = 2000

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.enabled = runtime.precision == "fp16"
        self.register_buffer("scale", torch.full((), 65536.0 if self.enabled else 1.0, device=runtime.device))
        self.register_buffer("good_steps", torch.zeros((), device=runtime.device))

    def update(self, applied: Tensor, weight: Tensor) -> None:
        """Adapt to one step, unless its weight is 0."""
        if not self.enabled:
            return
        good_steps = (self.good_steps + 1) * applied
        grow = good_steps >= self.growth_interval
        scale = torch.where(applied == 0, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.scale = torch.where(weight == 0, self.scale, scale)
        self.good_steps = torch.where(weight == 0, self.good_steps, torch.where(grow, 0.0, good_steps))


class Buffers:
    """A task's checkpointed buffers, such as batch statistics, packed by dtype so that a few kernels copy them all."""

    def __init__(self, task: Task) -> None:
        self._flat: dict[torch.dtype, list[Tensor]] = {}
        names = dict(task.named_buffers()).keys()
        for name, tensor in checkpointed_state(task).items():
            if name in names:
                self._flat.setdefault(tensor.dtype, []).append(flat_view(tensor))

    def copy(self) -> list[Tensor]:
        """Return a copy of the values."""
        return [torch.cat(flat) for flat in self._flat.values()]

    def put_back(self, values: Sequence[Tensor], where: Tensor | None = None) -> None:
        """Restore a copy if the device scalar `where` is true. None: always, without further memory."""
        for flat, before in zip(self._flat.values(), values):
            chosen = before if where is None else torch.where(where, before, torch.cat(flat))
            torch._foreach_copy_(flat, chosen.split([part.numel() for part in flat]))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum over micro-batches, or the tensor itself if there is one."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(dim=0)


def _forward_backward(learner: Any, batch: Batch, progress: Tensor, factor: Tensor) -> tuple[Tensor, StepOutput]:
    """Run one micro-batch with its gradient times `factor`. Return its weighted loss sum (detached) and its output."""
    with learner.runtime.autocast():
        output = learner.model(batch, progress)
    weight = batch["weight"]
    assert output.loss.shape == weight.shape, f"loss {tuple(output.loss.shape)}, weights {tuple(weight.shape)}"
    # Select, do not multiply: the loss of a blank sample may be NaN.
    weighted = torch.where(weight > 0, output.loss.float() * weight, 0.0).sum()
    (weighted * factor).backward()
    return weighted.detach(), output


def _pack(loss: Tensor, logs: dict[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """Return a micro-batch's loss and logs as one float64 tensor [1 + 2 N]."""
    parts = [loss, *(part for name in names for part in logs[name])]
    # stack would promote float32 and an integer to float32, which is too narrow.
    return torch.stack([part if part.dtype == torch.float32 else part.double() for part in parts]).double()


def _reduce(
    figures: Tensor, names: Sequence[str], weight: Tensor, norm: Tensor, asks: Asks, *, rows_only: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
    """Sum figures and flags over ranks in one collective. Return (sums, gradient norm, skip, asked).

    figures: the loss, then the logs. rows_only: `norm` covers only this rank's rows (fsdp).
    """
    total = F.pad(figures, (3, 1 if rows_only else 0))
    # In float64, the sum of two float32 values is finite only if both are.
    total[0] = ~torch.isfinite(norm + figures[0])
    for index, asked in enumerate(asks, start=1):
        if asked:
            total[index].fill_(1.0)
    if rows_only:
        total[-1] = norm.double().square()
    total = distributed.all_reduce_sum(total)
    bad = (total[0] > 0) | (weight == 0)
    kept = torch.where(bad, 0.0, total).unbind()
    sums = {"loss": (kept[3], torch.where(bad, 0.0, weight.double()))}
    sums |= {name: (kept[4 + 2 * index], kept[5 + 2 * index]) for index, name in enumerate(names)}
    if rows_only:
        norm = kept[-1].sqrt().to(norm.dtype)
    return sums, norm, bad, total[1:3]


def _clip(grads: list[Tensor], norm: Tensor, limit: float | None, inverse_scale: Tensor | None) -> None:
    """Undo the loss scale and clip the gradients, without a host synchronisation."""
    factor = inverse_scale
    if limit is not None:
        shrink = (limit / (norm + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        torch._foreach_mul_(grads, factor)


def train_step(learner: Any, batches: Sequence[Batch], progress: Tensor, asks: Asks = NOTHING) -> StepResult:
    """Make one update from this rank's micro-batches.

    learner: a Learner (engine/learner.py). progress: the share of the run. No host synchronisation, except one per step
    for optimisers that cannot skip on the device. Raises OutOfMemory, with no state changed.
    """
    optimizer, scale, step = learner.optimizer, learner.scale, learner.step
    weight = distributed.all_reduce_sum(_sum([batch["weight"].sum() for batch in batches]))
    denominator = weight.clamp_min(torch.finfo(torch.float32).tiny)
    # DDP and fully_shard average over ranks; the world size turns the average back into the sum.
    factor = scale.scale * distributed.world_size() / denominator
    before = learner.buffers.copy()
    rows, names, losses = [], [], []
    for micro_step, batch in enumerate(batches):
        rng.seed_micro_step(learner.seed, step, micro_step, distributed.rank(), learner.runtime.device)
        try:
            with no_sync(learner.model, last=micro_step == len(batches) - 1):
                loss, output = _forward_backward(learner, batch, progress, factor)
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            learner.buffers.put_back(before)
            raise OutOfMemory(batch) from None
        names = names or sorted(output.logs)
        losses.append(output.loss.detach())
        rows.append(_pack(loss, output.logs, names))

    # The optimiser holds all trained parameters (optim/groups.py).
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    drop_frozen_gradients(optimizer, step)
    grads = take_gradients(parameters)
    inverse_scale = 1.0 / scale.scale if scale.enabled else None
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if inverse_scale is not None:
        norm = norm * inverse_scale
    sums, norm, bad, asked = _reduce(_sum(rows), names, weight, norm, asks, rows_only=isinstance(parameters[0], Part))
    _clip(grads, norm, learner.clip_grad_norm, inverse_scale)

    found_inf = bad.float()
    applied = 1.0 - found_inf
    if skips_on_device(optimizer):
        optimizer.found_inf, optimizer.update = found_inf, step
        optimizer.step()
    elif not bad:  # a host synchronisation
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    learner.buffers.put_back(before, bad)
    scale.update(applied, weight)
    return StepResult(sums, torch.where(bad, 0.0, norm), applied, asked, weight, losses)


def fits_alone(learner: Any, batch: Batch) -> bool:
    """Return whether a pass over a micro-batch fits this rank's memory; no rank waits, and no state changes."""
    before, wrapped, learner.model = learner.buffers.copy(), learner.model, learner.task
    one, device = torch.ones((), device=learner.runtime.device), learner.runtime.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), distributed.alone():
            _forward_backward(learner, batch, 0 * one, one)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        learner.model = wrapped
        learner.optimizer.zero_grad(set_to_none=True)
        learner.buffers.put_back(before)
