"""Exponential moving average of a network's weights, with warm-up, on its device.

The decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run is not left with its initial weights (with a
plain 0.9999 they keep a share of 37 % after 10,000 steps).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from optim.fused import descend
from utils.ranks.sharded import own_part, take_part


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay for the average that follows update number `step`, counted from 0."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Follow the floating-point parameters and buffers of a network; other buffers are copied.

    `tensors` are the averages by name, as the network's state holds what they follow: where ranks share a parameter's
    rows (engine/parallel.py), they share the average's too.
    """

    def __init__(self, network: nn.Module) -> None:
        # The network's tensors are changed in place only, so they are looked up once.
        current = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        self.tensors = {name: tensor.clone() for name, tensor in current.items()}
        # What this rank holds of both; the same memory.
        self._current = {name: own_part(tensor) for name, tensor in current.items()}
        self._own = {name: own_part(tensor) for name, tensor in self.tensors.items()}
        followed = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
        # Averages and weights, by dtype: one kernel takes one.
        self._followed: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name in followed:
            averages, weights = self._followed.setdefault(self._current[name].dtype, ([], []))
            averages.append(self._own[name])
            weights.append(self._current[name])
        self._copied = [name for name in self._current if name not in set(followed)]

    @torch.no_grad()
    def update(self, decay: float, applied: torch.Tensor) -> None:
        """Move the average towards the weights by 1 - decay; not at all where `applied` (device scalar) is 0."""
        left_out = 1.0 - applied.float()
        for averages, current in self._followed.values():
            descend(averages, current, decay - 1.0, decay=-1.0, found_inf=left_out)
        for name in self._copied:
            self._own[name].copy_(self._current[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the network hold the averaged weights for a while; its own come back to the bit."""
        own = {name: tensor.clone() for name, tensor in self._current.items()}
        self._copy_in(self._own)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._current.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over an average that was saved (`tensors` of an earlier EMA, whole)."""
        assert tensors.keys() == self.tensors.keys(), "the average is of another network"
        for name, tensor in tensors.items():
            self._own[name].copy_(take_part(tensor, self.tensors[name]))
