"""The progress bar (rich.progress), shown on rank 0 if stderr is a terminal.

    bar = Bar("training", total_steps)
    with bar.opened(step):
        bar.advance(step)                                     every step, without a synchronisation
        bar.advance(step, description="epoch 3/20", figures="loss 0.1234")
    for batch in track(loader, len(loader), "evaluating val"): ...

Output to sys.stderr, such as log lines, appears above an open bar. The calling thread draws the bar: another thread
could hold a lock while the loader forks its workers. Without a terminal, `track` logs its progress once a minute.
"""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from utils.record.logging import environment_rank, log

T = TypeVar("T")

_REDRAW_SEC = 0.25
_LOG_SEC = 60.0

_console = Console(stderr=True, soft_wrap=True)  # soft_wrap: a path in a log line is copied in one piece


def _leave_to_parent() -> None:
    """Restore stderr in a forked worker, which must not draw."""
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_leave_to_parent)


class Bar:
    """A progress bar; bars that are open at once share the display. Without a terminal it only estimates the time."""

    def __init__(self, what: str, total: int) -> None:
        self._drawn = 0.0
        self.is_shown = environment_rank() == 0 and _console.file.isatty() and not _console.is_dumb_terminal
        # stdout goes where the user sends it. The time left follows from the mean speed.
        self._progress = Progress(
            "[bold]{task.description}", BarColumn(12), MofNCompleteColumn(), "[green]{task.fields[figures]}",
            TimeRemainingColumn(compact=True), "left", console=_console, auto_refresh=False, transient=True,
            redirect_stdout=False, speed_estimate_period=math.inf, disable=not self.is_shown,
        )  # fmt: skip
        self._task = self._progress.add_task(what, start=False, total=total, figures="")

    @contextmanager
    def opened(self, done: int = 0) -> Iterator[None]:
        """Show the bar, from `done` on."""
        self._progress.reset(self._task, completed=done)
        with self._progress:
            if self.is_shown:
                _console.show_cursor(True)  # rich hides it, and a killed process could not restore it
            yield

    def advance(self, done: int, **texts: str | int) -> None:
        """Set the progress, and `total`, `description` or `figures`; redraws at most four times a second."""
        self._progress.update(self._task, completed=done, **texts)
        if texts or time.monotonic() - self._drawn >= _REDRAW_SEC:
            self._drawn = time.monotonic()
            self._progress.refresh()

    @property
    def left_sec(self) -> float | None:
        """The seconds to the end at the mean speed since the first step; None at the start."""
        return self._progress.tasks[0].time_remaining


def track(iterable: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items and show the progress."""
    bar = Bar(what, total)
    logged = time.monotonic()
    with bar.opened():
        for done, item in enumerate(iterable, start=1):
            yield item
            bar.advance(done)
            if time.monotonic() - logged >= _LOG_SEC and environment_rank() == 0 and not bar.is_shown:
                logged = time.monotonic()
                log.info("%s: %s of %s", what, f"{done:,}", f"{total:,}")
