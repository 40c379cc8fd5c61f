"""Types that several rooms share. Importing them does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch = dict[str, "Tensor"]
Figures = dict[str, float]  # numbers by name
State = dict[str, "Tensor"]  # tensors by name: the weights of a network
Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class LoaderMachine:
    """What a loader knows of the machine; engine/update/runtime.py adds the precision."""

    device: torch.device  # the target of batches
    channels_last: bool  # the memory format of images
    workers: int  # loader processes of this rank
    prefetch_batches: int  # batches that each worker loads ahead


class InitFrom(NamedTuple):
    """The source of a run's first weights."""

    source: str  # a run, a file or `timm`
    weights: Literal["model", "ema"]


class TrainChoice(Protocol):
    """Which training images a run reads (`loop`); None: all."""

    find: str | None
    per_class: int | float | None
    count: int | None


class StepStream(Protocol):
    """What the loop needs of the endless training stream, which data/stream/loader.py documents."""

    epoch_length: int
    chunk: int | None
    unreadable_count: int

    def show(self, batch_size: int, micro_batch_size: int, ranks: int) -> Iterator[Batch]: ...

    def steps(self, start_step: int, batch_size: int, micro_batch_size: int) -> Iterator[list[Batch]]: ...

    def prepare(self, batch: Batch) -> Batch: ...

    def readings(self) -> Figures: ...

    def drop_copy(self) -> bool: ...

    def path_of(self, sample_id: int) -> str: ...
