"""train_step: the only forward, backward, clip and optimiser step in the repository.

The loss of a step is the weighted mean over all its samples, on all ranks and micro-batches: the sum of the weights is
known before the first backward pass, so accumulation and uneven weights are exact. Whether the step is finite is one
decision for all ranks that stays on the device; a step that is not leaves every tensor unchanged.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.runtime import Runtime
from engine.task import Batch, Knobs, StepOutput, Task
from optim.build import skips_on_device
from utils import distributed, rng


@dataclass
class StepResult:
    """Device scalars of one step, equal on all ranks.

    sums: log name -> (sum, count) over all samples of the step, float64; NaN is left out of a step that was skipped.
    applied: 1 where the optimiser made its step, 0 where it was left out.
    stop: above 0 where a rank was asked to stop.
    """

    sums: dict[str, tuple[Tensor, Tensor]]
    grad_norm: Tensor
    applied: Tensor
    stop: Tensor


class LossScale:
    """The dynamic loss scale of fp16: doubled after 2,000 finite steps, halved after one that is not.

    Lives on the device; `state()` is checkpointed. For other precisions it is 1 and stays so.
    """

    growth_interval = 2000

    def __init__(self, runtime: Runtime) -> None:
        self.enabled = runtime.precision == "fp16"
        self.scale = torch.full((), 65536.0 if self.enabled else 1.0, device=runtime.device)
        self.good_steps = torch.zeros((), device=runtime.device)

    def update(self, applied: Tensor) -> None:
        """Learn from one step."""
        if not self.enabled:
            return
        self.good_steps = (self.good_steps + 1) * applied
        grow = self.good_steps >= self.growth_interval
        self.scale = torch.where(applied == 0, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        self.scale, self.good_steps = (state[name].to(self.scale.device) for name in ("scale", "good_steps"))


def step_weight(batches: Sequence[Batch]) -> Tensor:
    """Return the sum of the weights of a step's samples over all ranks, at least the smallest positive number."""
    total = torch.stack([batch["weight"].sum() for batch in batches]).sum()
    return distributed.all_reduce_sum(total).clamp_min(torch.finfo(torch.float32).tiny)


def _forward_backward(
    model: nn.Module, batch: Batch, knobs: Knobs, denominator: Tensor, scale: Tensor, runtime: Runtime
) -> tuple[Tensor, StepOutput]:
    """Run one micro-batch; returns its weighted loss sum (detached) and the task's output."""
    with runtime.autocast():
        output = model(batch, knobs)
    weight = batch["weight"]
    assert output.loss.shape == weight.shape, f"loss {tuple(output.loss.shape)}, weights {tuple(weight.shape)}"
    # Select, so that a blank sample of weight 0 cannot bring a NaN in.
    weighted = torch.where(weight > 0, output.loss.float() * weight, 0.0).sum()
    # DDP averages over ranks where the mean over all samples is wanted: hence the world size.
    (weighted * (scale * distributed.world_size() / denominator)).backward()
    return weighted.detach(), output


def _reduce(
    loss: Tensor, outputs: Sequence[StepOutput], denominator: Tensor, bad: Tensor, stop: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Sum loss, logs and flags over micro-batches and ranks in one collective: (sums, not finite, stop)."""
    names = sorted(outputs[0].logs)
    columns = [bad, torch.full_like(loss, float(stop)), loss]
    for name in names:
        columns.append(torch.stack([output.logs[name][0].double() for output in outputs]).sum())
        columns.append(torch.stack([output.logs[name][1].double() for output in outputs]).sum())
    total = distributed.all_reduce_sum(torch.stack([column.double() for column in columns]))
    bad, stop_asked = total[0] > 0, total[1]
    total = torch.where(bad, torch.zeros_like(total), total)
    count = torch.where(bad, 0.0, denominator.double())
    sums = {"loss": (total[2], count)}
    sums |= {name: (total[3 + 2 * index], total[4 + 2 * index]) for index, name in enumerate(names)}
    return sums, bad, stop_asked


def _clip(grads: list[Tensor], norm: Tensor, limit: float | None, inverse_scale: Tensor) -> None:
    """Undo the loss scale and shrink the gradients to the limit, without asking the host."""
    factor = inverse_scale
    if limit is not None:
        factor = factor * (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor)


def train_step(
    model: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scale: LossScale,
    knobs: Knobs,
    *,
    step: int,
    seed: int,
    clip_grad_norm: float | None,
    runtime: Runtime,
    stop: bool = False,
) -> StepResult:
    """Make update number `step` (from 0) of the task from its micro-batches of this rank.

    `model` is the task as the ranks share it (DDP or the task itself); `stop` says that this rank was asked to stop.
    No host synchronisation, except for timm's optimisers, which cannot skip on the device: they cost one per step.
    """
    denominator = step_weight(batches)
    buffers = list(task.buffers())
    before = [buffer.clone() for buffer in buffers]
    losses, outputs = [], []
    for micro_step, batch in enumerate(batches):
        rng.seed_micro_step(seed, step, micro_step, distributed.rank(), runtime.device)
        last = micro_step == len(batches) - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            loss, output = _forward_backward(model, batch, knobs, denominator, scale.scale, runtime)
        losses.append(loss)
        outputs.append(output)

    grads = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    inverse_scale = 1.0 / scale.scale
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) * inverse_scale
    loss = torch.stack(losses).sum()
    sums, bad, stop_asked = _reduce(loss, outputs, denominator, ~(torch.isfinite(norm) & torch.isfinite(loss)), stop)
    _clip(grads, norm, clip_grad_norm, inverse_scale)

    applied = 1.0 - bad.float()
    if skips_on_device(optimizer):
        optimizer.found_inf = bad.float()
        optimizer.step()
    elif not bad:  # a host synchronisation
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(bad, old, buffer))
    scale.update(applied)
    return StepResult(sums, torch.where(bad, 0.0, norm), applied, stop_asked)
