"""Exponential moving averages of networks' weights.

With the warm-up the decay at step t is min(decay, (1 + t) / (10 + t)), so that a short run does not keep its initial
weights: with a constant 0.9999, as published recipes have it, they would keep a share of 37 % after 10,000 steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from utils.ranks.sharded import is_shared, own_part, take_part


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Return the decay for the average that follows update number `step`, counted from 0."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class EMA:
    """Average the floating-point parameters and buffers of a network; other buffers are copied.

    `tensors`: the averages by name. Where ranks hold rows of a parameter (engine/parallel.py), they hold the same rows
    of its average, on the device. An average on the "cpu" of a network on a GPU costs no host synchronisation: weights
    are copied to pinned memory, and averaged there at the next update, when the copy is complete, or by `flush`.
    """

    def __init__(self, network: nn.Module, device: Literal["device", "cpu"] = "device") -> None:
        # The network's tensors are changed in place only, so they are looked up once.
        current = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        self._current = {name: own_part(tensor) for name, tensor in current.items()}  # this rank's rows, same memory
        shared = any(map(is_shared, current.values()))
        self._on_host = device == "cpu" and not shared and any(tensor.is_cuda for tensor in current.values())
        if self._on_host:
            self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self._current.items()}
            self._source = {name: torch.empty_like(tensor, pin_memory=True) for name, tensor in self.tensors.items()}
        else:
            self.tensors = {name: tensor.clone() for name, tensor in current.items()}
            self._source = self._current
        self._own = {name: own_part(tensor) for name, tensor in self.tensors.items()}
        self._pending: tuple[float, Tensor, torch.cuda.Event] | None = None
        self._averaged: tuple[list[Tensor], list[Tensor]] = ([], [])  # averages and weights
        self._copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in self._source.items():
            lists = self._averaged if tensor.is_floating_point() else self._copied
            lists[0].append(self._own[name])
            lists[1].append(tensor)

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """Move the average towards the weights by 1 - decay; not at all where `applied` (device scalar) is 0."""
        if not self._on_host:
            self._average(decay, applied)
            return
        self.flush()
        flag = torch.empty((), dtype=torch.float32, pin_memory=True)
        flag.copy_(applied, non_blocking=True)
        for name, tensor in self._current.items():
            self._source[name].copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (decay, flag, event)

    @torch.no_grad()
    def flush(self) -> None:
        """Average the weights whose copy is under way, where the average is on the host."""
        if self._pending is not None:
            decay, flag, event = self._pending
            event.synchronize()
            self._average(decay, flag)
            self._pending = None

    def _average(self, decay: float, applied: Tensor) -> None:
        share, (averages, weights) = (1.0 - decay) * applied, self._averaged
        # A list of shares, because one share for all would be read on the host.
        torch._foreach_lerp_(averages, weights, [share.to(average.dtype) for average in averages])
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the network hold the averaged weights inside the context; its own are restored bit for bit."""
        self.flush()
        own = {name: tensor.clone() for name, tensor in self._current.items()}
        self._copy_in(self._own)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._current.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore an average (`tensors` of an earlier EMA, whole)."""
        assert tensors.keys() == self.tensors.keys(), "the average is of another network"
        self._pending = None
        for name, tensor in tensors.items():
            self._own[name].copy_(take_part(tensor, self.tensors[name]))


class Averages:
    """Averages of several networks by name, each kept where `devices` says."""

    def __init__(self, networks: Mapping[str, nn.Module], devices: Mapping[str, Literal["device", "cpu"]]) -> None:
        self._by_network = {name: EMA(network, devices[name]) for name, network in networks.items()}

    def update(self, decay: float, applied: Tensor) -> None:
        """Move all averages towards the weights."""
        for average in self._by_network.values():
            average.update(decay, applied)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let all networks hold their averaged weights inside the context."""
        with ExitStack() as stack:
            for average in self._by_network.values():
                stack.enter_context(average.swapped())
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by full name, `<network>.<tensor>`."""
        for average in self._by_network.values():
            average.flush()
        return {
            f"{network}.{name}": tensor
            for network, average in self._by_network.items()
            for name, tensor in average.tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the averages that `tensors` returned."""
        for network, average in self._by_network.items():
            prefix = f"{network}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            average.load(own)
