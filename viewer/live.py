"""The runs below some folders for pages that look again every few seconds."""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from utils.io.files import is_locked
from utils.record.run_index import RunIndex, RunState, find_runs
from utils.record.run_reader import LOCK_FILE


class LiveIndex(RunIndex):
    """An index that reads a run again only when it has changed. Threads may share it.

    total: the runs when they are read for the first time.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        super().__init__(roots)
        self.total = 0
        self._lock = Lock()
        self._known = dict[Path, tuple[list, RunState]]()

    def states(self) -> list[RunState]:
        """Return all runs; the run that changed last is the first."""
        with self._lock:
            self.total = self.total or len([*find_runs(self.roots)])
            return super().states()

    def known(self) -> list[RunState]:
        """Return the runs that are read so far; the run that changed last is the first."""
        return sorted((state for _, state in [*self._known.values()]), key=lambda state: -state.changed)

    def read(self, path: Path) -> RunState:
        """Return what one line says of a run; it is read again if a file of the run or the process has changed."""
        with os.scandir(path) as entries:
            status = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        files = sorted((name, file.st_mtime_ns, file.st_size) for name, file in status)
        stamp = [is_locked(path / LOCK_FILE), *files]
        known = self._known.get(path, ([], None))
        if known[0] != stamp:
            known = self._known[path] = stamp, super().read(path)
        return known[1]
