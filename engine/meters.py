"""Exact means over many steps, kept on the device until somebody asks."""

import torch
from torch import Tensor

from engine.step import StepResult


class Meter:
    """Sum (sum, count) pairs in float64; `means` is the only host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, result: StepResult) -> None:
        """Take one step's figures; a step that was left out counts as skipped and nowhere else."""
        ones = torch.ones((), dtype=torch.float64, device=self._device)
        pairs = result.sums | {
            "grad_norm": (result.grad_norm.double(), result.applied.double()),
            "skipped_steps": ((1.0 - result.applied).double(), ones),
        }
        for name, (total, count) in pairs.items():
            pair = torch.stack([total, count])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def state(self) -> dict[str, list[float]]:
        """Return the sums as numbers that a checkpoint keeps exactly."""
        names = sorted(self._sums)
        if not names:
            return {}
        return dict(zip(names, torch.stack([self._sums[name] for name in names]).tolist()))

    def load(self, state: dict[str, list[float]]) -> None:
        """Take over saved sums."""
        self._sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=self._device) for name, pair in state.items()
        }

    def means(self) -> dict[str, float]:
        """Return the means and begin anew; `skipped_steps` is a count. A mean over nothing is NaN."""
        means = {}
        for name, (total, count) in self.state().items():
            means[name] = total if name == "skipped_steps" else (total / count if count else float("nan"))
        self._sums = {}
        return means
