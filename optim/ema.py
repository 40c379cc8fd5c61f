"""Exponential moving averages of networks' weights.

With warm-up, the decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run forgets its initial weights.
With a constant decay of 0.9999, as in published recipes, their share would still be 37 % after 10,000 steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from utils.ranks.sharded import is_shared, own_part


def ema_decay_at(step: int, decay: float, *, warmup: bool, start_step: int) -> float:
    """Return the decay after update number `step`, counted from 0; before `start_step` the average is the weights."""
    if step < start_step:
        return 0.0
    step -= start_step
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Averages:
    """Averages of floating-point parameters and buffers, by `<network>.<name>`; other buffers are copied.

    Averages of sharded parameters are sharded on the device. Averages on the "cpu" of a network on
    a GPU need no host synchronisation: weights are copied to pinned memory in the background, and averaged at the next
    update or by `flush`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], devices: Mapping[str, Literal["device", "cpu"]]) -> None:
        # The networks' tensors only change in place, so they are looked up once.
        self._weights: dict[str, Tensor] = {}  # views of this rank's rows
        self._averages: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}  # copies of weights for averages on the host
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
        """Move the averages towards the weights by 1 - decay, unless `applied` (a device scalar) is 0."""
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
        """Wait for the copy to the host, and average these weights."""
        if self._pending is not None:
            decay, flag, event = self._pending
            event.synchronize()
            self._average(self._pinned.keys(), self._pinned, decay, flag)
            self._pending = None

    def _average(self, names: Iterable[str], weights: Mapping[str, Tensor], decay: float, applied: Tensor) -> None:
        pairs = [(self._own[name], weights[name]) for name in names]
        share = (1.0 - decay) * applied
        if averaged := [pair for pair in pairs if pair[0].is_floating_point()]:
            # A list of tensors: torch would read a single one on the host.
            shares = [share.to(average.dtype) for average, _ in averaged]
            torch._foreach_lerp_(*map(list, zip(*averaged)), shares)
        if copied := [pair for pair in pairs if not pair[0].is_floating_point()]:
            torch._foreach_copy_(*map(list, zip(*copied)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Load the averages into the networks inside the context, then restore their weights bit for bit."""
        self.flush()
        weights = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._copy_in(self._own)
        try:
            yield
        finally:
            self._copy_in(weights)

    @torch.no_grad()
    def _copy_in(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._weights.items():
            tensor.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by name, not copied; sharded if the weights are."""
        self.flush()
        return dict(self._averages)
