"""Tensors of which each rank holds some rows (`runtime.parallel=fsdp`): told apart, cut, and gathered whole.

Such a tensor is a DTensor of torch's fully_shard. Every helper takes plain tensors too.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from utils.ranks.distributed import is_main, rank, world_size


class Part(nn.Parameter):
    """The rows of a parameter that this rank holds, as the optimiser knows them: the memory of `whole`, a DTensor."""

    whole: nn.Parameter


def own_parts(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters as an optimiser takes them: of shared ones this rank's rows."""
    return [_part(parameter) if is_shared(parameter) else parameter for parameter in parameters]


def _part(parameter: nn.Parameter) -> Part:
    part = Part(own_part(parameter), requires_grad=parameter.requires_grad)
    part.whole = parameter
    return part


def holds_rows(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether an optimiser's parameters are rows of shared ones, so that norms are summed over ranks."""
    return isinstance(parameters[0], Part)


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
    """Return the rows of `whole` that this rank holds of `like`, as a view; all of them where `like` is not shared.

    torch's fully_shard gives a rank ceil(rows / ranks) rows, the last ones fewer or none.
    """
    if not is_shared(like):
        return whole
    rows = whole.shape[0]
    share = -(-rows // world_size())
    part = whole[min(rank() * share, rows) : min((rank() + 1) * share, rows)]
    assert part.shape == own_part(like).shape, (part.shape, like.shape, like.placements)
    return part


def gather_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors whole: themselves where none is shared, else copies on the CPU of rank 0 and nothing elsewhere.

    Every rank calls it with the same names in the same order. One is gathered after another, so that rank 0 holds no
    more than one of them on its device.
    """
    if not any(map(is_shared, tensors.values())):
        return dict(tensors)
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if is_shared(tensor):
            whole[name] = _gather(tensor)
        elif is_main():
            whole[name] = tensor.detach().to("cpu", copy=True)
    return whole if is_main() else {}


def _gather(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a shared tensor on the CPU on rank 0, None on other ranks."""
    own, rows = own_part(tensor), tensor.shape[0]
    share = -(-rows // world_size())
    if len(own) < share:
        own = torch.cat([own, own.new_zeros(share - len(own), *own.shape[1:])])
    parts = [torch.empty_like(own) for _ in range(world_size())] if is_main() else None
    dist.gather(own, parts)
    return torch.cat(parts)[:rows].cpu() if parts is not None else None
