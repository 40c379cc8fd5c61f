"""Sharded tensors (`runtime.parallel=fsdp`): each rank holds some rows of a DTensor from torch's fully_shard.

Every function also accepts plain tensors.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from utils.contracts import State, Tensors
from utils.ranks.distributed import is_main, rank, world_size


class Part(nn.Parameter):
    """This rank's rows of a sharded parameter, for the optimiser. Shares the memory of `whole`, a DTensor."""

    whole: nn.Parameter


def own_parts(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters for an optimiser: sharded ones become `Part`s."""
    parts = []
    for whole in parameters:
        part = whole
        if is_shared(whole):
            part = Part(own_part(whole), requires_grad=whole.requires_grad)
            part.whole = whole
        parts.append(part)
    return parts


def is_shared(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without the import of DTensor, which takes 0.4 s."""
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, or all of a plain one; detached, not copied."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor.detach()


def as_shared(part: Tensor, like: Tensor) -> Tensor:
    """Return a sharded tensor whose rows on this rank are `part`, sharded like `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def take_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return a view of the rows of `whole` that this rank holds in `like`; all rows if `like` is not sharded."""
    if not is_shared(like):
        return whole
    chunks = whole.chunk(world_size())  # like fully_shard: the last ranks may have fewer rows or none
    return chunks[rank()] if rank() < len(chunks) else whole[:0]


def gather_parts(tensors: Tensors) -> State:
    """Return whole tensors: on rank 0 copies on the CPU, on other ranks nothing; without sharded tensors the same ones.

    All ranks call it with the same names in the same order. A device holds only one whole tensor at a time.
    """
    if not any(map(is_shared, tensors.values())):
        return dict(tensors)
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.detach().full_tensor() if is_shared(tensor) else tensor.detach()
        if is_main():
            whole[name] = full.to("cpu", copy=True)
    return whole
