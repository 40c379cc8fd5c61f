"""Tensors of which each rank holds some rows (`runtime.parallel=fsdp`), the DTensors of torch's fully_shard.

Every function takes plain tensors too.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from utils.ranks.distributed import is_main, rank, world_size


class Part(nn.Parameter):
    """The rows of a parameter that this rank holds, as the optimiser knows them: the memory of `whole`, a DTensor."""

    whole: nn.Parameter


def own_parts(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters as an optimiser takes them: of shared ones this rank's rows."""
    parts = []
    for whole in parameters:
        part = Part(own_part(whole), requires_grad=whole.requires_grad) if is_shared(whole) else whole
        if isinstance(part, Part):
            part.whole = whole
        parts.append(part)
    return parts


def is_shared(tensor: torch.Tensor) -> bool:
    """Return whether each rank holds some of a tensor's rows: a DTensor, told without the 0.4 s of its import."""
    return hasattr(tensor, "placements")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a shared tensor, any other tensor as it is; both detached, neither copied."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor.detach()


def as_shared(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the shared tensor of which this rank holds `part` as it holds its rows of `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def take_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the rows of `whole` that this rank holds of `like`, as a view; all of them where `like` is not shared."""
    if not is_shared(like):
        return whole
    chunks = whole.chunk(world_size())  # as fully_shard cuts: the last ranks may have fewer rows or none
    return chunks[rank()] if rank() < len(chunks) else whole[:0]


def gather_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors whole: themselves where none is shared, else copies on the CPU of rank 0 and nothing elsewhere.

    Every rank calls it with the same names in the same order. One is gathered after another, so that a device holds no
    more than one of them.
    """
    if not any(map(is_shared, tensors.values())):
        return dict(tensors)
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.detach().full_tensor() if is_shared(tensor) else tensor.detach()
        if is_main():
            whole[name] = full.to("cpu", copy=True)
    return whole
