"""Types that cross rooms: what one room hands to another, stated where both may import it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
DeviceHook = Callable[[Batch], Batch]


class Machine(Protocol):
    """The machine as a loader sees it (engine/runtime.py: Runtime)."""

    device: torch.device  # that batches are moved to
    channels_last: bool  # the memory format of images
    workers: int  # loader processes of this rank
    prefetch_batches: int  # that each of them prepares ahead


class BatchPlan(Protocol):
    """How the ranks share a step's samples (engine/plan.py: Plan)."""

    world_size: int
    global_batch_size: int  # samples per update, over all ranks
    micro_batch_size: int  # samples per forward pass
    accum_steps: int  # forward passes per update


class TrainStream(Protocol):
    """The endless training stream (data/stream/loader.py)."""

    epoch_length: int  # positions
    chunk: int | None  # neighbouring positions of one shape; None where the sampler groups nothing
    unreadable_count: int  # images that could not be read so far, on this rank

    def trial_batches(self, size: int) -> Iterator[Batch]:
        """Yield `size` times one sample of each shape, on the device; no part of the stream."""

    def steps(self, start_step: int, plan: BatchPlan) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of step after step, from `start_step` on."""

    def readings(self) -> Mapping[str, float]:
        """Return what the data's caches have counted so far, on this rank."""

    def path_of(self, sample_id: int) -> str:
        """Return a sample's path, for messages."""
