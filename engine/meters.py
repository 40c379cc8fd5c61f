"""Exact means over many steps, accumulated on the device."""

import torch
from torch import Tensor

from engine.step import StepResult


def _lay_out(names: list[str], figures: Tensor, every: list[str]) -> Tensor:
    """Return figures [N, 2] with a row for each name of `every`, 0 where a name is absent."""
    rows, nothing = dict(zip(names, figures)), figures.new_zeros(2)
    return torch.stack([rows.get(name, nothing) for name in every])


class Meter:
    """Sum (sum, count) pairs in float64; `means` is the only host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [N, 2]

    def add(self, result: StepResult) -> None:
        """Take one step's figures; a skipped step counts only as skipped."""
        names, figures = result.figures
        if self._sums is None:
            self._names, self._sums = names, figures
            return
        if names != self._names:
            every = sorted({*names, *self._names})
            figures, self._sums = _lay_out(names, figures, every), _lay_out(self._names, self._sums, every)
            self._names = every
        self._sums = self._sums + figures  # a new tensor: the figures of a step may be in several meters

    def state(self) -> dict[str, list[float]]:
        """Return the sums as numbers, exact in JSON."""
        return {} if self._sums is None else dict(zip(self._names, self._sums.tolist()))

    def load(self, state: dict[str, list[float]]) -> None:
        """Restore saved sums."""
        self._names, self._sums = sorted(state), None
        if state:
            pairs = [state[name] for name in self._names]
            self._sums = torch.tensor(pairs, dtype=torch.float64, device=self._device)

    def means(self) -> dict[str, float]:
        """Return the means and reset; `skipped_steps` is a count. A mean over nothing is NaN."""
        means = {}
        for name, (total, count) in self.state().items():
            means[name] = total if name == "skipped_steps" else (total / count if count else float("nan"))
        self._names, self._sums = [], None
        return means
