"""The contract of a tracker: what it is told of a run, and the calls that it takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from utils.record.report_files import TableRow


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run. `config` is the saved configuration, with `script`.

    step: where the run begins or resumes; samples_per_step: the global batch size; sweep: the name of its multirun;
    id: for W&B, None is that of the folder.
    """

    folder: Path
    config: Mapping[str, Any]
    step: int = 0
    samples_per_step: int = 1
    sweep: str | None = None
    id: str | None = None


class Tracker(Protocol):
    """A tracker as the engine uses it; figures are numbers, null where they were not finite."""

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Take a row of metrics of kind train, evaluate or epoch."""

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Take a picture [H, W, 3] uint8."""

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Take a table of an evaluation."""

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Take the weights of a complete run; alias: `best` or `last`."""

    def close(self, failed: bool = False) -> None:
        """Write the rest; `failed`: the run ended by an error."""


class LoggedWeights(NamedTuple):
    """The weight file that a tracker gets at the end of a run, and its name: best or last."""

    file: Path
    alias: str


def logged_weights(folder: Path) -> LoggedWeights:
    """Return the best weights in a run's weights/, or the last ones where there are no best ones."""
    best = folder / "best_weights.safetensors"
    return LoggedWeights(best, "best") if best.exists() else LoggedWeights(folder / "last_weights.safetensors", "last")


def name_figures(kind: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers under `kind/name`."""
    return {
        f"{kind}/{name}": value
        for name, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
