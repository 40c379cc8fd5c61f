"""Updates as CUDA graphs: a GPU repeats the kernels of an update without waiting for Python to start each of them.

An update of a small network has hundreds of kernels of a few microseconds, which take longer to start than to run.
After some updates of the same shapes, the learner records an update and replays it for the later ones. Replays draw the
same random numbers, and differ from other updates only by the rounding of the learning rate to float32.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.update.step import StepResult
from optim.groups import is_frozen
from optim.schedules import GroupValues
from utils.contracts import Batch
from utils.record.logging import log

_EAGER_UPDATES = 2  # of the same shapes precede a recording: they choose kernels and create state
_MOST_GRAPHS = 16  # one for each bucket of SDXL
_MOST_KEYS = 100  # a momentum or weight decay that changes with every update is not recorded
Prepare = Callable[[Batch], Batch]  # of `Learner`


@dataclass
class _Recorded:
    """A recorded update. values: the progress, and the groups' rates. results: the result of the newest replay."""

    batch: Batch
    values: Tensor
    results: list[StepResult]
    replay: Callable[[], None]


@dataclass
class UpdateGraphs:
    """The recorded updates of an optimiser.

    gradients: computes the gradients of a batch at a progress. apply: makes the optimiser's step. seed: seeds the draws
    of a pass. is_off: recording is not possible. recorded: updates by the values that they depend on.
    """

    optimizer: Optimizer
    device: torch.device
    gradients: Callable[[Batch, Tensor], StepResult]
    apply: Callable[[StepResult], None]
    seed: Callable[[], None]
    is_off: bool = False

    def __post_init__(self) -> None:
        """Begin without a recorded update."""
        self._reset()

    def _reset(self) -> None:
        self._groups = self.optimizer.param_groups
        self._counts = Counter()
        self._pool = None  # the memory of the graphs, which they share, because one is replayed after another
        self.recorded = {}

    def drop(self) -> bool:
        """Record and replay no more, which frees the memory of the graphs. Return whether there were any."""
        had_any = bool(self.recorded)
        self._reset()
        self.is_off = True
        return had_any

    def update(
        self, step: int, batch: Batch, progress: float, values: GroupValues, prepare: Prepare
    ) -> StepResult | None:
        """Make update number `step` by a graph. Return None if no graph can make it."""
        if self._groups is not self.optimizer.param_groups:  # loading a state replaces the optimiser's tensors
            self._reset()
        if self.is_off:
            return None
        recorded = self._find(step, batch, values, prepare)
        if recorded is None:
            return None
        recorded.values.copy_(self._values(progress), non_blocking=True)
        for name, tensor in batch.items():
            recorded.batch[name].copy_(tensor, non_blocking=True)
        self.seed()
        recorded.replay()
        return recorded.results[-1].clone()

    def _find(self, step: int, batch: Batch, values: GroupValues, prepare: Prepare) -> _Recorded | None:
        """Return the recorded update of a batch's shapes; record it after enough updates of these shapes."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        frozen = tuple(is_frozen(group, step) for group in self._groups)
        key = (prepare, shapes, frozen, values.weight_decay, values.momentum)
        if key not in self.recorded:
            self._counts[key] += 1
            self.is_off = len(self._counts) > _MOST_KEYS
            if self._counts[key] > _EAGER_UPDATES and len(self.recorded) < _MOST_GRAPHS:
                self._record(key, batch)
        return self.recorded.get(key)

    def _values(self, progress: float) -> Tensor:
        return torch.tensor([progress, *(group["lr"] for group in self.optimizer.param_groups)], dtype=torch.float32)

    def _record(self, key: Any, batch: Batch) -> None:
        """Record an update without making it; give up if that is not possible."""
        try:
            if self.device.type == "cuda":
                _check_memory(self.device)
            self.recorded[key] = self._capture(batch)
        except RuntimeError as error:  # also torch.OutOfMemoryError
            log.info("runtime.cuda_graphs: updates are started kernel by kernel: %s", str(error).partition("\n")[0])
            self.drop()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            log.debug("runtime.cuda_graphs: an update was recorded")

    def _capture(self, batch: Batch) -> _Recorded:
        optimizer = self.optimizer
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        values = self._values(0.0).to(self.device)
        results = []

        def compute() -> None:
            results[:] = [self.gradients(inputs, values[0])]
            self.apply(*results)

        self.seed()
        before = torch.default_generator.get_state()
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, values[1:]):
            group["lr"] = rate
        try:
            replay, self._pool = record_graph(compute, self.device, self._pool)
        finally:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        if not torch.equal(before, torch.default_generator.get_state()):
            raise RuntimeError("the task draws random numbers on the CPU")
        return _Recorded(inputs, values, results, replay)


def _check_memory(device: torch.device) -> None:
    """Raise RuntimeError unless a recording fits beside an update: each takes as much memory as updates so far."""
    held = torch.cuda.memory_allocated(device)  # weights, state, and the copy of the images
    needed = 2 * (torch.cuda.max_memory_allocated(device) - held)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    if needed > free:
        raise RuntimeError(f"an update and its recording take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def record_graph(function: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Capture a function without running it. Return a function that replays its kernels, and the memory pool.

    On a CPU, the replay calls the function. pool: the memory of another recording, to share. Raises RuntimeError, the
    function's own, if it waits for the GPU or memory runs out; then the stream and the allocator are as before.
    """
    if device.type != "cuda":
        return function, None
    graph = torch.cuda.CUDAGraph()
    pool = pool or torch.cuda.graph_pool_handle()
    errors = []
    try:
        # After a failure torch leaves its own stream as the current one. Threads of the loader may call CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            try:
                function()
            except RuntimeError as error:
                errors.append(error)  # the end of the capture raises another one
                raise
    except RuntimeError as error:
        with suppress(RuntimeError):  # torch 2.11 and 2.12 go on to allocate from the pool (pytorch #180395)
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        graph.reset()
        raise (errors or [error])[0] from None
    return graph.replay, graph.pool()
