"""What caches count: hits and misses of all loader workers of a rank."""

import os

import torch

_PROCESSES = 256  # processes that are alive at once have neighbouring numbers


class Counters:
    """Counts of a rank and its workers, which add without a lock: each process in a row of its own."""

    def __init__(self, *names: str) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._rows = torch.zeros(_PROCESSES, len(names), dtype=torch.int64).share_memory_()

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a count."""
        self._rows.numpy()[os.getpid() % _PROCESSES, self._places[name]] += amount

    def totals(self) -> dict[str, int]:
        """Return the counts over all processes, in the order of the names."""
        return dict(zip(self._places, self._rows.sum(dim=0).tolist()))
