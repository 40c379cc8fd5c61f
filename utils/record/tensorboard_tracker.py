"""TensorBoard: a run's figures and pictures as event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.record.report_files import TableRow
from utils.record.tracker import name_figures


class TensorboardTracker:
    """TensorBoard event files in <run>/tensorboard/; a resumed run hides the events beyond its checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.5 s

        path = folder / "tensorboard"
        resumed = path.exists()
        self._writer = SummaryWriter(str(path), purge_step=step + 1 if resumed else None, flush_secs=30)

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Write the row's figures."""
        for name, value in name_figures(kind, figures).items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Write nothing: TensorBoard has no tables; the run folder has tables/<name>.csv."""

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Write nothing: TensorBoard keeps no models."""

    def close(self, failed: bool = False) -> None:
        """Write the rest."""
        self._writer.close()
