"""The micro-batch size of each image shape, halved when the device runs out of memory.

A run begins with `loop.batch_size`, or with all samples of a rank (`auto`). A pass that runs out of memory changes
nothing: the update is repeated with micro-batches half as large, as are later updates of that shape. Samples, order,
global batch and learning rate stay. batch_size.json in the run folder keeps the sizes by device and shape.

A rank that runs out of memory would leave the others waiting in a collective. With several ranks, `auto` therefore
tries every shape before training, and all ranks halve together (`Learner.rehearse`). A rank that runs out of memory
later ends the run; the same command resumes with the smaller size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from engine.plan import largest_divisor
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.files import write_json
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

_SIZES = TypeAdapter(dict[str, dict[str, Annotated[int, Field(ge=1)]]])


def shape_of(batch: Batch) -> str:
    """Return the shape of one sample in a batch's largest field, such as `3x224x224`."""
    largest = max(batch.values(), key=lambda tensor: tensor.numel())
    return "x".join(map(str, largest.shape[1:]))


def out_of_memory(stage: str, shape: str, size: int, *, next_step: str = "the same command resumes") -> UserError:
    """Return the error of a device that ran out of memory in `stage`."""
    return UserError(
        f"loop.batch_size: the device is out of memory in {stage}, with {size} samples of {shape} at once; set a "
        f"smaller loop.batch_size, runtime.grad_checkpointing=true, or a smaller model or image; {next_step}"
    )


class MicroBatches:
    """The micro-batch size by image shape. `begin` is the first size of every shape."""

    def __init__(self, begin: int, *, halves: bool) -> None:  # halves: loop.on_out_of_memory
        self.begin, self.halves, self.sizes = begin, halves, dict[str, int]()
        self._file: Path | None = None
        self._by_device: dict[str, dict[str, int]] = {}

    def open(self, folder: Path, device: torch.device) -> None:
        """Read this device's sizes from the run folder, and save later changes there."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._file = folder / "batch_size.json"
        self._by_device = distributed.rank_zero_call(self._read)
        self.sizes = self._by_device.setdefault(name, {})

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            return _SIZES.validate_json(self._file.read_bytes()) if self._file.exists() else {}
        except ValueError as error:
            raise UserError(f"loop.batch_size: {self._file} is damaged; remove it to search again") from error

    @property
    def smallest(self) -> int:
        """The smallest size, which fits every shape."""
        return min([self.begin, *self.sizes.values()])

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """Cut the loader's micro-batches to the current sizes; samples and order stay the same."""
        parts = []
        for batch in batches:
            size = largest_divisor(len(batch["weight"]), self.sizes.get(shape_of(batch), self.begin))
            parts += [_cut(batch, first, size) for first in range(0, len(batch["weight"]), size)]
        return parts

    def halve(self, shape: str, size: int, *, everywhere: bool = True) -> None:
        """Halve the size of a shape. everywhere: all ranks do so now; otherwise the run must end and resume.

        Raises UserError if the run must end, a micro-batch has one sample, or `loop.on_out_of_memory=stop`.
        """
        if not self.halves or size == 1:
            raise out_of_memory("training", shape, size)
        half = self.sizes[shape] = largest_divisor(size, size // 2)
        if self._file is not None and (distributed.is_main() or not everywhere):
            write_json(self._file, self._by_device)
        if not everywhere:
            raise out_of_memory("training", shape, size, next_step=f"the same command resumes with {half}")
        log.warning("out of memory with %d samples of %s at once; from now on %d", size, shape, half)


def _cut(batch: Batch, first: int, size: int) -> Batch:
    """Return `size` samples from `first` on; ragged fields (data/stream/batch.py) keep all values, with new offsets."""
    part = {name: tensor[first : first + size] for name, tensor in batch.items()}
    for name in batch:
        if (offsets := f"{name}_offsets") in batch:
            part |= {name: batch[name], offsets: batch[offsets][first : first + size + 1]}
    return part
