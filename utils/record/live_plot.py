"""Live plots: plots/curves.png of a run, drawn again by another process as its metrics.jsonl grows.

    live = LivePlots(folder)     rank 0 of a run with tracking.live_plots=true
    live.is_drawing              False where it has died: the run then draws by itself
    live.close()                 before the run draws its last rows

The process ends with its parent, however the run ends.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.config.help import ROOT
from utils.io.files import ignore_write_errors
from utils.io.memo import file_version
from utils.ranks.signals import SIGNALS
from utils.record.logging import setup_logging
from utils.record.metrics_log import METRICS_FILE
from utils.record.run_reader import RunReader

_PAUSE_SEC = 3.0  # at least, between drawings
_PAUSE = 20  # times the duration of a drawing: at most 5 % of the time
_NICENESS = 10


class LivePlots:
    """A process that draws the curves of a run folder, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.record.live_plot", str(folder.resolve()), str(os.getpid())],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def is_drawing(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def follow(folder: Path, parent: int) -> None:
    """Draw a run's curves as its rows come, while the parent lives."""
    from utils.record.plots import plot_curves  # imports matplotlib

    picture, drawn = folder / "plots/curves.png", None
    while os.getppid() == parent:
        version, started = file_version(folder / METRICS_FILE), time.monotonic()
        if version != drawn:
            with ignore_write_errors(picture):
                plot_curves(RunReader(folder).rows, picture, folder.resolve().name)
            drawn = version
        time.sleep(max(_PAUSE_SEC, _PAUSE * (time.monotonic() - started)))


if __name__ == "__main__":
    for number in SIGNALS:  # which a scheduler sends to all processes of a run
        signal.signal(number, lambda *_: sys.exit())  # so that no temporary file stays
    setup_logging()
    os.nice(_NICENESS)
    follow(Path(sys.argv[1]), int(sys.argv[2]))
