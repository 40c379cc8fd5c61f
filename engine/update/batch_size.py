"""The micro-batch size, halved when the device runs out of memory.

A run begins with `loop.micro_batch_size`, or with all samples of a rank (`auto`). A pass that runs out of memory
changes nothing: the update is repeated with micro-batches half as large, as are all later updates. Samples, order,
batch and learning rate stay. micro_batch_size.json in the run folder keeps the size; another device begins anew.

A rank that runs out of memory would leave the others waiting in a collective. With several ranks, `auto` therefore
tries every shape before training, and all ranks halve together (`Learner.rehearse`). A rank that runs out of memory
later ends the run; the same command resumes with the smaller size.
"""

from collections.abc import Sequence
from pathlib import Path

from engine.plan import largest_divisor
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.files import read_json


def show_samples(batch: Batch) -> str:
    """Return the number of samples and the shape of their largest field, such as `8 samples of 3x224x224`."""
    largest = max(batch.values(), key=lambda tensor: tensor.numel())
    return f"{len(batch['weight'])} samples of {'x'.join(map(str, largest.shape[1:]))}"


def out_of_memory(stage: str, samples: str) -> UserError:
    """Return the error of a device that ran out of memory in `stage`. samples: from `show_samples`."""
    return UserError(
        f"loop.micro_batch_size: the device is out of memory in {stage}, with {samples} at once; set a smaller "
        "loop.micro_batch_size, runtime.grad_checkpointing=true, or a smaller model or image; the same command resumes"
    )


def split(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Cut the loader's micro-batches to at most `size` samples each; samples and order stay the same."""
    parts = []
    for batch in batches:
        part = largest_divisor(len(batch["weight"]), size)
        parts += [_cut(batch, first, part) for first in range(0, len(batch["weight"]), part)]
    return parts


def _cut(batch: Batch, first: int, size: int) -> Batch:
    """Return `size` samples from `first` on; ragged fields (data/stream/batch.py) keep all values, with new offsets."""
    part = {name: tensor[first : first + size] for name, tensor in batch.items()}
    for name in batch:
        if (offsets := f"{name}_offsets") in batch:
            part |= {name: batch[name], offsets: batch[offsets][first : first + size + 1]}
    return part


def read_size(file: Path, begin: int, device: str) -> int:
    """Return the size that an earlier start of the run found on an equal device, or `begin`."""
    try:
        found = read_json(file) if file.exists() else {}
        return min(begin, found["size"]) if found.get("device") == device else begin
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"loop.micro_batch_size: {file} is damaged; remove it to search again") from error
