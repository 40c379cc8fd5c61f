"""Exponential moving average of a network's weights, with warm-up, on its device.

The decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run is not left with its initial weights (with a
plain 0.9999 they keep a share of 37 % after 10,000 steps).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay for the average that follows update number `step`, counted from 0."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Follow the floating-point parameters and buffers of a network; other buffers are copied."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        averages, current, copied = [], [], []
        for name, tensor in self._network.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                current.append(tensor.detach())
            else:
                copied.append((self.tensors[name], tensor))
        return averages, current, copied

    @torch.no_grad()
    def update(self, decay: float, applied: torch.Tensor) -> None:
        """Move the average towards the weights by 1 - decay; not at all where `applied` (device scalar) is 0."""
        averages, current, copied = self._pairs()
        change = torch._foreach_sub(current, averages)
        torch._foreach_mul_(change, applied * (1.0 - decay))
        torch._foreach_add_(averages, change)
        for average, tensor in copied:
            average.copy_(tensor)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the network hold the averaged weights for a while; its own come back to the bit."""
        own = {name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()}
        self._copy_in(self.tensors)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._network.state_dict().items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over an average that was saved (`tensors` of an earlier EMA)."""
        assert tensors.keys() == self.tensors.keys(), "the average is of another network"
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
