"""Types that cross rooms: what one room hands to another, stated where both may import it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
DeviceHook = Callable[[Batch], Batch]


class Machine(Protocol):
    """The machine as a loader sees it (engine/runtime.py: Runtime)."""

    @property
    def device(self) -> torch.device:
        """The device that batches are moved to."""

    @property
    def channels_last(self) -> bool:
        """The memory format of images."""

    @property
    def workers(self) -> int:
        """Loader processes of this rank."""

    @property
    def prefetch_batches(self) -> int:
        """Batches that each of them prepares ahead."""


class BatchPlan(Protocol):
    """How the ranks share a step's samples (engine/plan.py: Plan)."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def global_batch_size(self) -> int:
        """Samples per update, over all ranks."""

    @property
    def micro_batch_size(self) -> int:
        """Samples per forward pass."""

    @property
    def accum_steps(self) -> int:
        """Forward passes per update."""


class TrainStream(Protocol):
    """The endless training stream (data/loader.py)."""

    @property
    def epoch_length(self) -> int:
        """Positions per epoch."""

    @property
    def chunk(self) -> int | None:
        """Neighbouring positions of one shape; None where the sampler groups nothing."""

    @property
    def unreadable_count(self) -> int:
        """Images that could not be read so far, on this rank."""

    @property
    def shapes(self) -> int:
        """The number of shapes that samples come in; 1 where the sampler groups nothing."""

    def trial_batch(self, shape: int, size: int) -> Batch:
        """Return `size` times one sample of a shape, on the device; no part of the stream."""

    def steps(self, start_step: int, plan: BatchPlan) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of step after step, from `start_step` on."""

    def readings(self) -> Mapping[str, float]:
        """Return what the data's caches have counted so far, on this rank."""

    def path_of(self, sample_id: int) -> str:
        """Return a sample's path, for messages."""
