"""The progress bar (rich.progress), shown on rank 0 if stderr is a terminal.

    bar = Bar("training", total_steps)
    with bar.opened(step):
        bar.advance(step)                                     every step, from a number that the host knows
        bar.advance(step, description="epoch 3/20", figures="loss 0.1234")
    for batch in track(loader, len(loader), "evaluating val"): ...
    with counting("reading") as report: report(done, total)

While a bar is shown, log lines and other output to sys.stderr appear above it. The calling thread draws it, a few times
a second: a second thread could hold a lock while the loader forks its workers. Without a terminal, `track` and
`counting` log their progress once a minute.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TimeRemainingColumn

from utils.record.logging import environment_rank, get_logger

log = get_logger(__name__)
T = TypeVar("T")

_REDRAW_SEC = 0.25
_LOG_SEC = 60.0
_WIDE_COLUMNS = 110  # below, figures take the bar's place

_progress: Progress | None = None  # with a line for each job under way: a terminal has one last line


def _open_progress() -> Progress:
    console = Console(stderr=True, soft_wrap=True)  # a path in a log line is copied in one piece
    # stdout goes where the user sends it. The time left is that of the mean speed.
    progress = Progress(
        "[bold]{task.description}", *([BarColumn(20)] if console.width >= _WIDE_COLUMNS else []),
        MofNCompleteColumn(), "[green]{task.fields[figures]}",
        TimeRemainingColumn(compact=True), "left", console=console, auto_refresh=False, transient=True,
        redirect_stdout=False, speed_estimate_period=math.inf,
        disable=environment_rank() != 0 or not console.file.isatty() or console.is_dumb_terminal,
    )  # fmt: skip
    progress.start()
    if not progress.disable:
        console.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back
    return progress


def _leave_to_parent() -> None:
    """Give a forked process, a loader's worker, the plain stderr: the display is its parent's."""
    global _progress
    _progress = None
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_leave_to_parent)


class Bar:
    """A line of the display, while it is open; without a terminal it only estimates the time that is left."""

    def __init__(self, what: str, total: int | None) -> None:
        self.total = total
        self._what, self._drawn = what, 0.0
        self._line: Task | None = None

    @contextmanager
    def opened(self, done: int = 0) -> Iterator[None]:
        """Show the bar, from `done` on."""
        global _progress
        is_outermost = _progress is None
        progress = _progress = _progress or _open_progress()
        number = progress.add_task(self._what, total=self.total, completed=done, figures="")
        self._line = next(task for task in progress.tasks if task.id == number)
        try:
            yield
        finally:
            self._line = None
            progress.remove_task(number)
            if is_outermost:
                _progress = None
                progress.stop()

    def advance(self, done: int, **texts: str) -> None:
        """Set the progress, and the texts `description` and `figures`; drawn a few times a second."""
        if self._line is not None and _progress is not None:
            _progress.update(self._line.id, completed=done, total=self.total, **texts)
            if texts or time.monotonic() - self._drawn >= _REDRAW_SEC:
                self._drawn = time.monotonic()
                _progress.refresh()

    @property
    def left_sec(self) -> float | None:
        """The seconds to the end by the mean speed; None at the start. What is before the first step does not count."""
        return None if self._line is None else self._line.time_remaining


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar and yield what moves it: `report(done, total)`."""
    bar, logged = Bar(what, None), time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal logged
        bar.total = total
        bar.advance(done)
        if time.monotonic() - logged >= _LOG_SEC and environment_rank() == 0 and _progress.disable:
            logged = time.monotonic()
            log.info("%s: %s of %s", what, f"{done:,}", "?" if total is None else f"{total:,}")

    with bar.opened():
        yield report


def track(iterable: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yield the items, showing how many of `total` were used."""
    with counting(what) as report:
        for done, item in enumerate(iterable, start=1):
            yield item
            report(done, total)
