"""The learner: a task with its optimiser, schedule and averages. It needs no run folder.

learner = Learner(task, config, plan, runtime)
result = learner.update(batches)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from engine.config import TrainingConfig
from engine.plan import Plan
from engine.task import Task, checkpointed_state, networks_of, split_exported
from engine.update.batch_size import MicroBatches
from engine.update.parallel import no_sync, wrap_task
from engine.update.runtime import Runtime, choose_compile
from engine.update.step import StepResult, backward, first_scale, next_scale, reduce_figures
from optim.build import build_optimizer, step_by_gradients
from optim.groups import build_groups, is_frozen, parameters_of, set_group_values
from optim.schedules import GroupValues, Schedule, ema_decay_at
from optim.state import load_optimizer_state, optimizer_state
from utils import rng
from utils.contracts import Batch, State, Tensors
from utils.errors import UserError
from utils.io.files import Json, Values
from utils.ranks import distributed
from utils.record.logging import log
from utils.start import open_name

if TYPE_CHECKING:
    from engine.update.graphs import UpdateGraphs


Groups = dict[str, State]  # tensors by group and name
_TINY = torch.finfo(torch.float32).tiny


class Learner:
    """Task, optimiser, loss scale, averages and schedule. `step` counts the updates done.

    Only `update` makes a forward pass, a backward pass and an optimiser step (its parts: engine/update/step.py).
    wrapped: the task, wrapped for the ranks and compiled. exports_average: the averaged weights are evaluated and
    exported. prepare: turns a batch of the stream into the task's input.
    """

    def __init__(self, task: Task, config: TrainingConfig, plan: Plan, runtime: Runtime) -> None:
        self.task = task.train()
        self.runtime = runtime
        self.config = config
        self.seed = config.seed
        self.clip_grad_norm = config.loop.clip_grad_norm
        self.step = 0
        if getattr(config.optim, "bf16_weights", False):
            open_name("optim.alone:store_in_bf16")(task.parameters(), runtime.precision)
        self.compiles = choose_compile(config, runtime.device.type, plan.total_steps)
        self.wrapped = wrap_task(task, config.runtime, runtime, compiles=self.compiles)
        if config.runtime.offload and not task.offloaded:
            raise UserError("runtime.offload: true, but a step needs all networks of this task; set it to false")
        if config.runtime.offload:
            for network in networks_of(task, task.offloaded).values():
                network.to("cpu")  # the task brings it to the device itself
        self.prepare = dict
        self._buffers = _Buffers(task)
        groups = build_groups(task, networks_of(task, task.trained), config.optim)
        self.optimizer = build_optimizer(config.optim, groups, plan.lr)
        self.fused = None
        if getattr(config.optim, "fused_backward", False):
            self.fused = open_name("optim.alone:FusedBackward")(self.optimizer)
        may_halve = self.fused is None and not distributed.is_distributed()  # else other ranks wait in a collective
        self.micro_batches = MicroBatches(plan.micro_batch_size, may_halve=may_halve)
        self.scale = first_scale(runtime)
        self.graphs = self.record_updates() if self._may_record() else None
        self.averages = None
        if config.loop.ema_decay is not None:
            self.averages = open_name("optim.ema:Averages")(networks_of(task, task.averaged))
        self.exports_average = self.averages is not None and {*task.exported} <= {*task.averaged}
        self.use_length(plan)

    def use_length(self, plan: Plan) -> None:
        """Schedule the rate over the steps of a plan."""
        self.plan = plan
        decay = self.config.optim.weight_decay
        self.schedule = Schedule(self.config.schedule, plan.lr, decay, plan.total_steps, plan.warmup_steps)

    def update(self, batches: Sequence[Batch], values: GroupValues | None = None) -> StepResult:
        """Make one update from this rank's micro-batches; halve them when the device runs out of memory.

        The host waits for the device only if the optimiser cannot skip a step there. values: replace the values of the
        schedule; progress is then 0.
        """
        share = 0.0 if values is not None else self.schedule.progress_at(self.step)
        values = values or self.schedule.at(self.step)
        set_group_values(self.optimizer, values)
        result = None
        if self.graphs is not None and len(batches) == 1 and len(batches[0]["weight"]) <= self.micro_batches.size:
            result = self.graphs.update(self.step, batches[0], share, values, self.prepare)
        progress = torch.full((), share, device=self.runtime.device)
        if result is None:
            before = self._buffers.copy()
            while result is None:
                parts = self.micro_batches.split(batches)
                with suppress(torch.OutOfMemoryError):  # the error holds the activations: it must end first
                    result = self._gradients(parts, progress, before)
                if result is None:
                    self.optimizer.zero_grad(set_to_none=True)
                    self._buffers.put_back(before)
                    if not self.drop_recordings():
                        self.micro_batches.halve(parts[0])
            self._apply(result)
        self.task.after_step(self.step, progress, result.applied)
        if self.averages is not None:
            loop = self.config.loop
            decay = ema_decay_at(self.step - loop.ema_start_steps, loop.ema_decay, warmup=loop.ema_warmup)
            self.averages.update(decay, result.applied)
        self.step += 1
        return result

    def drop_recordings(self) -> bool:
        """Free what a device that is out of memory can do without. Return whether updates were recorded."""
        dropped = self.graphs is not None and self.graphs.drop()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        return dropped

    def _seed_pass(self, part: int = 0) -> None:
        """Seed what the pass of a micro-batch draws."""
        rng.seed_micro_step(self.seed, self.step, part, distributed.rank(), self.runtime.device)

    def record_updates(self) -> "UpdateGraphs":
        """Return what records updates of one micro-batch."""
        from engine.update.graphs import UpdateGraphs

        def gradients(batch: Batch, progress: Tensor) -> StepResult:
            return self._gradients([batch], progress, self._buffers.copy(), seeds=False)

        return UpdateGraphs(self.optimizer, self.runtime.device, gradients, self._apply, self._seed_pass)

    def _gradients(
        self, parts: Sequence[Batch], progress: Tensor, before: Sequence[Tensor], *, seeds: bool = True
    ) -> StepResult:
        """Compute the clipped gradients of all micro-batches. Buffers change unless the update will be skipped.

        before: the values of the buffers. seeds: whether to seed the draws of each micro-batch.
        """
        weight = distributed.all_reduce_sum(sum(part["weight"].sum() for part in parts))
        # DDP averages over ranks; the world size turns the average back into the sum.
        factor = self.scale["scale"] * distributed.world_size() / weight.clamp_min(_TINY)
        begin = None if self.fused is None else partial(self.fused.begin, self.step)
        passes = []
        for number, part in enumerate(parts):
            if seeds:
                self._seed_pass(number)
            with no_sync(self.wrapped, last=number == len(parts) - 1):
                with self.runtime.autocast():
                    output = self.wrapped(self.prepare(part), progress)
                passes.append(backward(output, part["weight"], factor, begin))
            del output  # its tensors end before the next pass
        figures, names, losses = zip(*passes)
        # The optimiser holds all trained parameters (optim/groups.py).
        parameters = parameters_of(self.optimizer)
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if is_frozen(group, self.step) else ():
                parameter.grad = None  # the optimiser skips it
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(grads) if self.fused is None else self.fused.end()
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.runtime.precision == "fp16":
            inverse_scale = 1.0 / self.scale["scale"]
            torch._foreach_mul_(grads, inverse_scale)
            norm = norm * inverse_scale
        sums, norm, bad = reduce_figures(sum(figures), weight, norm)
        if self.clip_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        self._buffers.put_back(before, bad)
        skipped = bad.float()
        applied = 1.0 - skipped
        figures = torch.cat([sums, torch.stack([norm, applied, skipped, torch.ones_like(applied)])]).view(-1, 2)
        return StepResult((*names[0], "grad_norm", "skipped_steps"), figures, applied, weight, losses)

    def _apply(self, result: StepResult) -> None:
        """Make the optimiser's step, unless the update is skipped."""
        if self.fused is None:
            step_by_gradients(self.optimizer, result.applied, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.runtime.precision == "fp16":
            self.scale = next_scale(self.scale, result.applied, result.weight)

    def _may_record(self) -> bool:
        """Return whether an update is a function of tensors on one GPU alone, but for learning rate and seed."""
        config = self.config.runtime
        if not (config.cuda_graphs and self.task.may_be_recorded and self.runtime.device.type == "cuda"):
            return False
        if config.offload or config.memory_gib or config.deterministic or self.runtime.precision == "fp16":
            return False
        if distributed.is_distributed():
            log.info("runtime.cuda_graphs: not with several ranks; a small network may train faster on one GPU")
            return False
        if self.fused is not None:
            return False
        groups = self.optimizer.param_groups
        is_bf16 = groups[0]["params"][0].dtype == torch.bfloat16  # the host seeds its rounding
        # A graph repeats a step that counts steps and reads the rate on the device.
        return not is_bf16 and all(group.get("capturable") or group.get("fused") for group in groups)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Put the evaluated and exported weights into the task inside the context: averages, if they are exported."""
        with self.averages.swapped() if self.exports_average else nullcontext():
            yield

    def sync_buffers(self) -> None:
        """Broadcast the buffers (batch statistics) and their averages from rank 0, before they are read."""
        averages = {} if self.averages is None else self.averages.tensors()
        for name, buffer in self.task.named_buffers() if distributed.is_distributed() else ():
            dist.broadcast(buffer, src=0)
            if name in averages:  # buffers outside the state dict have no average
                dist.broadcast(averages[name], src=0)

    # ------------------------------------------------------------------------------------------------------- state

    def state(self) -> tuple[Groups, Json]:
        """Return the tensors by group and name, and the optimiser's other state.

        Groups: `weights` (the exported networks, named as in weight files), `task` (the rest of the task),
        `average_weights` and `averages` likewise, `optimizer`, `scale`.
        """
        tensors, others = optimizer_state(self.optimizer)
        return {**self._task_groups(), "optimizer": tensors, "scale": self.scale}, others

    def _task_groups(self) -> Groups:
        """Return the task's tensors and their averages, by group."""
        weights, rest = split_exported(self.task, checkpointed_state(self.task))
        groups = {"weights": weights, "task": rest}
        if self.averages is not None:
            groups["average_weights"], groups["averages"] = split_exported(self.task, self.averages.tensors())
        return groups

    def exported_tensors(self) -> State:
        """Return the current tensors of a weight file; inside `evaluated`."""
        return self._task_groups()["weights"]

    @torch.no_grad()
    def load_state(self, tensors: Groups, others: Values | None, source: str) -> None:
        """Load the state of a checkpoint. others: None keeps the optimiser's state.

        Raises UserError unless the tensors have this learner's names, shapes and dtypes.
        """
        groups = {**self._task_groups(), "scale": self.scale}
        for group, current in groups.items():
            wrong = sorted({name for name, *_ in _shapes(current) ^ _shapes(tensors.get(group, {}))})
            if wrong:
                raise UserError(
                    f"resume: {source} is a checkpoint of another model: {len(wrong)} tensors of {group} differ, first "
                    f"{wrong[0]!r}; give another run_dir"
                )
        if others is not None:
            load_optimizer_state(self.optimizer, tensors["optimizer"], others, source)
        for group, current in groups.items():
            for name, tensor in current.items():
                tensor.copy_(tensors[group][name])


class _Buffers:
    """The checkpointed buffers of a task, such as batch statistics, grouped by dtype: a few kernels copy them."""

    def __init__(self, task: Task) -> None:
        self._flat = {}
        names = dict(task.named_buffers()).keys()
        for name, tensor in checkpointed_state(task).items():
            if name in names:
                # The memory as a vector, for any dense layout.
                axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
                self._flat.setdefault(tensor.dtype, []).append(tensor.permute(axes).view(-1))

    def copy(self) -> list[Tensor]:
        """Return a copy of the values."""
        return [torch.cat(flat) for flat in self._flat.values()]

    def put_back(self, values: Sequence[Tensor], where: Tensor | None = None) -> None:
        """Restore a copy if the device scalar `where` is true. None: always, without further memory."""
        for flat, before in zip(self._flat.values(), values):
            chosen = before if where is None else torch.where(where, before, torch.cat(flat))
            torch._foreach_copy_(flat, chosen.split([part.numel() for part in flat]))


def _shapes(tensors: Tensors) -> set[tuple]:
    return {(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
