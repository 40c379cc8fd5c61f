"""The progress bar, shown on rank 0 if stderr is a terminal.

    bar = Bar("training", total_steps)
    with bar.opened(step):
        bar.advance(step)                                     every step, from a number that the host knows
        bar.show("epoch 3/20", "loss 0.1234", eta_sec)        at log steps
    for batch in track(loader, len(loader), "evaluating val"): ...
    with counting("drawing the glyphs") as report: draw_glyphs(root, report)

While a bar is shown, log lines and other output to sys.stderr appear above it. The calling thread
draws it, a few times a second: a second thread could hold a lock while the loader forks its workers. Without a
terminal, `track` and `counting` log their progress once a minute.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from utils.record.figures import show_duration
from utils.record.logging import environment_rank, get_logger, print_through

log = get_logger(__name__)
T = TypeVar("T")

_REDRAW_SEC = 0.25
_LOG_SEC = 60.0
_WIDE_COLUMNS = 110  # below, figures go before the bar

_progress: Progress | None = None  # with a line for each job under way: a terminal has one last line
_drawn = 0.0


def shows_bars() -> bool:
    """Return whether this process shows bars: rank 0, on a terminal that can redraw a line."""
    stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # replaced by a display that is already open
    return environment_rank() == 0 and stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _open_progress() -> Progress:
    console = Console(stderr=True)
    fields = (("bold", "description"), ("magenta", "fields[count]"), ("green", "fields[figures]"))
    columns = [TextColumn(f"{{task.{name}}}", style, table_column=Column(no_wrap=True)) for style, name in fields]
    bar = [BarColumn(bar_width=20)] if console.width >= _WIDE_COLUMNS else []
    left = TextColumn("{task.fields[left]} left", "cyan", table_column=Column(no_wrap=True))
    # stdout goes where the user sends it.
    progress = Progress(
        columns[0], *bar, *columns[1:], left, console=console, auto_refresh=False, transient=True, redirect_stdout=False
    )
    progress.start()
    console.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back
    print_through(lambda line: console.print(Text(line), soft_wrap=True))  # a path is copied in one piece
    return progress


def _leave_to_parent() -> None:
    """Give a forked process, a loader's worker, the plain stderr: the display is its parent's."""
    global _progress
    if _progress is not None:
        _progress = None
        print_through(None)
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_leave_to_parent)


class Bar:
    """A line of the display, while it is open; without a terminal it only estimates the time that is left."""

    def __init__(self, what: str, total: int | None) -> None:
        self.total = total
        self._what, self._has_texts = what, False
        self._line: TaskID | None = None
        self._origin, self._is_first = (0, 0.0), True

    @contextmanager
    def opened(self, done: int = 0) -> Iterator[None]:
        """Show the bar, from `done` on."""
        global _progress
        self._origin, self._is_first = (done, time.perf_counter()), True
        if not shows_bars():
            yield
            return
        owner = _progress is None
        progress = _progress = _progress or _open_progress()
        self._line = progress.add_task(self._what, total=self.total, completed=done, count="", figures="", left="-:--")
        try:
            self._update(now=True)
            yield
        finally:
            progress.remove_task(self._line)
            self._line = None
            if owner:
                _progress = None
                print_through(None)
                progress.stop()

    def _update(self, *, now: bool, **fields: Any) -> None:
        """Set what is shown, and draw if enough time has passed, or `now`."""
        global _drawn
        if self._line is None or _progress is None:
            return
        _progress.update(self._line, **fields)
        if now or time.monotonic() - _drawn >= _REDRAW_SEC:
            _drawn = time.monotonic()
            _progress.refresh()

    def advance(self, done: int) -> None:
        """Set the progress; drawn a few times a second."""
        count = f"{done:,}" if self.total is None else f"{done:,}/{self.total:,}"
        left = {} if self._has_texts else {"left": show_duration(self._estimate(done))}
        self._update(now=False, completed=done, total=self.total, count=count, **left)

    def show(self, what: str, figures: str, eta_sec: float | None) -> None:
        """Set the texts, and draw."""
        self._has_texts = True
        self._update(now=True, description=what, figures=figures, left=show_duration(eta_sec))

    @property
    def is_shown(self) -> bool:
        """Whether it is on the screen."""
        return self._line is not None

    def _estimate(self, done: int) -> float | None:
        (first, since), now = self._origin, time.perf_counter()
        return (now - since) / (done - first) * (self.total - done) if done > first and self.total else None

    def remaining_sec(self, done: int) -> float | None:
        """Estimate the seconds from `done` to the end by the mean speed since the bar was opened; None at the start.

        The time before the first call is used for the first estimate only: compiling and starting workers happen once.
        """
        estimate = self._estimate(done)
        if self._is_first:
            self._origin, self._is_first = (done, time.perf_counter()), False
        return estimate


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar and yield what moves it: `report(done, total)`."""
    bar, said = Bar(what, None), time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal said
        bar.total = total
        bar.advance(done)
        if time.monotonic() - said >= _LOG_SEC and environment_rank() == 0 and not shows_bars():
            said = time.monotonic()
            log.info("%s: %s of %s", what, f"{done:,}", "?" if total is None else f"{total:,}")

    with bar.opened():
        yield report


def track(iterable: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yield the items, showing how many of `total` were used."""
    with counting(what) as report:
        for done, item in enumerate(iterable, start=1):
            yield item
            report(done, total)
