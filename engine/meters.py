"""Exact means over many steps, accumulated on the device; the seconds and the memory of training."""

import resource
import sys
import time

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

    def means(self, *, goes_on: bool = False) -> dict[str, float]:
        """Return the means and reset, unless it `goes_on`; `skipped_steps` is a count. A mean over nothing is NaN."""
        means = {}
        for name, (total, count) in self.state().items():
            means[name] = total if name == "skipped_steps" else (total / count if count else float("nan"))
        if not goes_on:
            self._names, self._sums = [], None
        return means


class TrainingClock:
    """The seconds of training so far, over all resumptions, without evaluations, drawings and checkpoints.

    waited: the seconds among them in which the loop waited for data.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._waits_since: float | None = None
        self._seconds = 0.0
        self._since: float | None = None  # None: stopped
        self._epoch = (0, 0.0)  # steps and seconds at the start of the epoch

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def turn(self, is_on: bool, *, waits: bool = False) -> None:
        """Start or stop the clock; where it already is so, nothing happens. waits: for data, from now on."""
        now = time.perf_counter()
        self.waited += 0.0 if self._waits_since is None else now - self._waits_since
        self._waits_since = now if waits else None
        if is_on and self._since is None:
            self._since = time.perf_counter()
        elif not is_on and self._since is not None:
            self._seconds, self._since = self.seconds, None

    def end_epoch(self, step: int, *, goes_on: bool = False) -> float:
        """Return the steps per second of the epoch that ends at `step`, NaN where it took no time; the next begins.

        goes_on: the run ends within the epoch, so that none begins.
        """
        first, since = self._epoch
        now = self.seconds
        if not goes_on:
            self._epoch = (step, now)
        return (step - first) / (now - since) if now > since else float("nan")

    def state(self) -> dict[str, float]:
        """Return the seconds as JSON numbers."""
        step, seconds = self._epoch
        return {"seconds": self.seconds, "epoch_step": step, "epoch_seconds": seconds, "waited": self.waited}

    def load(self, state: dict[str, float] | None, step: int) -> None:
        """Restore a saved state, with the clock stopped; None, of older checkpoints, counts from `step` on."""
        state = state or {"seconds": 0.0, "epoch_step": step, "epoch_seconds": 0.0}
        self._seconds, self._since = state["seconds"], None
        self.waited, self._waits_since = state.get("waited", 0.0), None
        self._epoch = (int(state["epoch_step"]), state["epoch_seconds"])


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has used: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class PeakMemory:
    """The most memory that a run has used, over all resumptions; a GPU's is counted from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0.0  # of earlier processes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # a sweep runs several jobs in one process

    @property
    def gib(self) -> float:
        """Return the peak so far."""
        return max(self._before, peak_memory_gib(self._device))

    def load(self, gib: float | None) -> None:
        """Restore a saved peak; None, of older checkpoints, counts this process alone."""
        self._before = gib or 0.0
