"""Exponential moving averages of networks' weights. Averages that start later equal the weights until then."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.contracts import State, Tensors


class Averages:
    """Averages of floating-point parameters and buffers, by `<network>.<name>`; other buffers are copied.

    They are on the device of the weights.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        # The networks' tensors only change in place, so they are looked up once.
        self._weights = {}
        self._averages = {}
        for network, module in networks.items():
            for name, tensor in module.state_dict().items():
                self._weights[f"{network}.{name}"] = tensor
                self._averages[f"{network}.{name}"] = tensor.detach().clone()

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """Move the averages towards the weights by 1 - decay, unless `applied` (a device scalar) is 0."""
        pairs = [(self._averages[name], weight) for name, weight in self._weights.items()]
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
        weights = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._copy_in(self._averages)
        try:
            yield
        finally:
            self._copy_in(weights)

    @torch.no_grad()
    def _copy_in(self, tensors: Tensors) -> None:
        for name, tensor in self._weights.items():
            tensor.copy_(tensors[name])

    def tensors(self) -> State:
        """Return the averages by name, not copied."""
        return dict(self._averages)
