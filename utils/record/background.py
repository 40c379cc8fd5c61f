"""A tracker in a thread of its own: the run hands over its figures and goes on.

The thread only works: its messages are logged by the main thread, so that a process forked meanwhile inherits no lock
of the logger.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.record.logging import get_logger
from utils.record.report_files import TableRow
from utils.record.tracker import Tracker

log = get_logger(__name__)

Say = Callable[[str], None]

_MOST_WAITING = 10_000  # rows and pictures; a run of a million steps writes 20,000 rows
_STOP_SEC = 5.0  # for the rest of a run that goes on later: a job that is preempted has no more

_unfinished: set[threading.Thread] = set()


def has_unfinished() -> bool:
    """Return whether a tracker of this process still works after its close; its library may hold up the exit."""
    return any(thread.is_alive() for thread in _unfinished)


class BackgroundTracker:
    """Start a tracker in a thread, and pass calls on to it until one fails; then warn once and drop the rest.

    make: starts the tracker, in the thread; what it says is logged by the main thread. finish_sec: how long a complete
    run waits for it.
    """

    def __init__(self, name: str, make: Callable[[Say], Tracker], finish_sec: float) -> None:
        self._name, self._make, self._finish_sec = name, make, finish_sec
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._said: deque[tuple[int, str]] = deque()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def add_row(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        """Pass a row on."""
        row = dict(figures)
        self._pass_on(lambda tracker: tracker.add_row(step, kind, row))

    def add_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Pass a picture on."""
        self._pass_on(lambda tracker: tracker.add_image(step, name, image))

    def add_table(self, step: int, name: str, rows: Sequence[TableRow]) -> None:
        """Pass a table on."""
        self._pass_on(lambda tracker: tracker.add_table(step, name, rows))

    def add_model(self, file: Path, alias: str, metadata: Mapping[str, Any]) -> None:
        """Pass the weights on."""
        self._pass_on(lambda tracker: tracker.add_model(file, alias, metadata))

    def close(self, failed: bool = False, *, goes_on: bool = False) -> None:
        """Close the tracker and wait for it; a few seconds only where the run goes on later, or has failed."""
        self._pass_on(lambda tracker: tracker.close(failed))
        patience = _STOP_SEC if goes_on or failed else self._finish_sec
        until = time.monotonic() + patience
        with contextlib.suppress(queue.Full):  # said below
            self._waiting.put(None, timeout=patience if self._thread.is_alive() else 0.0)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            _unfinished.add(self._thread)
            self._say(
                f"{self._name} has not taken everything within {patience:g} s; the rest is in the run folder",
                logging.WARNING,
            )
        self._log()

    def _pass_on(self, call: Callable[[Tracker], None]) -> None:
        self._log()
        if self._failed:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._fail(f"{_MOST_WAITING:,} figures and pictures wait for it")

    def _work(self) -> None:
        """Start the tracker and pass calls on, in the thread."""
        tracker = None
        try:
            tracker = self._make(self._say)
            while (call := self._waiting.get()) is not None and not self._failed:
                call(tracker)
        except BaseException as error:  # a server, a disk, a foreign library, which may ask to exit
            self._fail(f"{type(error).__name__}: {error}")
        if self._failed and tracker is not None:
            with contextlib.suppress(BaseException):
                tracker.close(failed=True)

    def _fail(self, why: str) -> None:
        self._failed = True
        text = (
            f"tracking: {self._name} failed ({why}) and is disabled; the run continues, and metrics.jsonl has every row"
        )
        self._say(text, logging.WARNING)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        self._said.append((level, text))

    def _log(self) -> None:
        """Log what the thread has said, in the main thread."""
        while self._said:
            level, text = self._said.popleft()
            log.log(level, "%s", text)
