"""The micro-batch size, halved when the device runs out of memory.

A run begins with `loop.micro_batch_size`, or with all samples of a rank (`auto`). A pass that runs out of memory
changes nothing: this update is repeated with micro-batches half as large, and later updates keep that size. Samples,
order, batch and learning rate stay. With several ranks, a rank that runs out of memory would leave the other ranks in a
collective, so it ends the run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.config import largest_divisor
from utils.contracts import Batch
from utils.errors import UserError
from utils.record.logging import log


def show_samples(batch: Batch) -> str:
    """Return the number of samples and the shape of their largest field, such as `8 samples of 3x224x224`."""
    largest = max(batch.values(), key=lambda tensor: tensor.numel())
    return f"{len(batch['weight'])} samples of {'x'.join(map(str, largest.shape[1:]))}"


@contextmanager
def naming_memory(key: str) -> Iterator[None]:
    """Raise UserError (`key`) where the device runs out of memory inside the context."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{key}: the device is out of memory; set a smaller one") from None


def out_of_memory(stage: str, samples: str) -> UserError:
    """Return the error for a device that ran out of memory in `stage`. samples: from `show_samples`."""
    return UserError(
        f"loop.micro_batch_size: the device is out of memory in {stage}, with {samples} at once; set a smaller "
        "loop.micro_batch_size, runtime.grad_checkpointing=true, or a smaller model or image; the run then resumes"
    )


@dataclass
class MicroBatches:
    """The largest micro-batch, `size`, which is halved when it does not fit.

    may_halve: false for several ranks, and for a fused backward pass, which has updated parameters.
    """

    size: int
    may_halve: bool = True

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """Cut the loader's micro-batches to at most `size` samples each; samples and order stay the same."""
        parts = []
        for batch in batches:
            samples = len(batch["weight"])
            part = largest_divisor(samples, self.size)
            for first in range(0, samples, part):
                fields = {name: tensor[first : first + part] for name, tensor in batch.items()}
                # Ragged ones (data/stream/batch.py) keep all values, with new offsets.
                for offsets in (name for name in batch if name.endswith("_offsets")):
                    fields[offsets] = batch[offsets][first : first + part + 1]
                    fields[offsets.removesuffix("_offsets")] = batch[offsets.removesuffix("_offsets")]
                parts.append(fields)
        return parts

    def halve(self, part: Batch) -> None:
        """Halve the size after `part` ran out of memory. Raises UserError for one sample, or without `may_halve`."""
        samples = len(part["weight"])
        if samples == 1 or not self.may_halve:
            raise out_of_memory("training", show_samples(part))
        self.size = largest_divisor(samples, samples // 2)
        log.warning("out of memory with %s at once; from now on %d", show_samples(part), self.size)
