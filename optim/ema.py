"""Exponential moving averages of networks' weights.

With the warm-up the decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run does not keep its initial
weights: with a constant 0.9999, as published recipes have it, they would keep a share of 37 % after 10,000 steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from utils.ranks.sharded import is_shared, own_part, take_part


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Return the decay for the average that follows update number `step`, counted from 0."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Averages:
    """Average the floating-point parameters and buffers of networks by `<network>.<name>`; other buffers are copied.

    Where ranks hold rows of a parameter (engine/parallel.py), they hold the same rows of its average, on the device. An
    average on the "cpu" of a network on a GPU costs no host synchronisation: weights are copied to pinned memory, and
    averaged there at the next update, when the copy is complete, or by `flush`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], devices: Mapping[str, Literal["device", "cpu"]]) -> None:
        # The networks' tensors are changed in place only, so they are looked up once.
        self._weights: dict[str, Tensor] = {}  # this rank's rows, same memory
        self._averages: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}  # weights on their way to an average on the host
        for network, module in networks.items():
            current = {f"{network}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
            shared = any(map(is_shared, current.values()))
            on_host = devices[network] == "cpu" and not shared and any(tensor.is_cuda for tensor in current.values())
            for name, tensor in current.items():
                self._weights[name] = own_part(tensor)
                self._averages[name] = tensor.to("cpu", copy=True) if on_host else tensor.clone()
                if on_host:
                    self._pinned[name] = torch.empty_like(self._averages[name], pin_memory=True)
        self._own = {name: own_part(tensor) for name, tensor in self._averages.items()}
        self._pending: tuple[float, Tensor, torch.cuda.Event] | None = None

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """Move the averages towards the weights by 1 - decay; not at all where `applied` (device scalar) is 0."""
        self._average(self._weights.keys() - self._pinned.keys(), self._weights, decay, applied)
        if not self._pinned:
            return
        self.flush()
        flag = torch.empty((), dtype=torch.float32, pin_memory=True)
        flag.copy_(applied, non_blocking=True)
        for name, tensor in self._pinned.items():
            tensor.copy_(self._weights[name], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (decay, flag, event)

    @torch.no_grad()
    def flush(self) -> None:
        """Average the weights whose copy to the host is under way."""
        if self._pending is not None:
            decay, flag, event = self._pending
            event.synchronize()
            self._average(self._pinned.keys(), self._pinned, decay, flag)
            self._pending = None

    def _average(self, names: Iterable[str], weights: Mapping[str, Tensor], decay: float, applied: Tensor) -> None:
        pairs = [(self._own[name], weights[name]) for name in names]
        share = (1.0 - decay) * applied
        if averaged := [pair for pair in pairs if pair[0].is_floating_point()]:
            # A list of shares, because one share for all would be read on the host.
            shares = [share.to(average.dtype) for average, _ in averaged]
            torch._foreach_lerp_(*map(list, zip(*averaged)), shares)
        if copied := [pair for pair in pairs if not pair[0].is_floating_point()]:
            torch._foreach_copy_(*map(list, zip(*copied)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the networks hold the averages inside the context; their own weights are restored bit for bit."""
        self.flush()
        own = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._copy_in(self._own)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._weights.items():
            tensor.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by name; of shared weights, shared."""
        self.flush()
        return dict(self._averages)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore averages (`tensors` of earlier ones, whole)."""
        assert tensors.keys() == self._averages.keys(), "the averages are of other networks"
        self._pending = None
        for name, tensor in tensors.items():
            self._own[name].copy_(take_part(tensor, self._averages[name]))
