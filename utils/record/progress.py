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
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from utils.record.figures import show_duration
from utils.record.logging import environment_rank, get_logger, print_through

log = get_logger(__name__)
T = TypeVar("T")

_REDRAW_SEC = 0.25
_LOG_SEC = 60.0
_WIDE_COLUMNS = 110  # below, figures go before the bar and the elapsed time


def shows_bars() -> bool:
    """Return whether this process shows bars: rank 0, on a terminal that can redraw a line."""
    stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # replaced by a display that is already open
    return environment_rank() == 0 and stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class _CountColumn(ProgressColumn):
    """Show the number done and the total."""

    def render(self, task: Task) -> Text:
        """Render."""
        done, of = f"{int(task.completed):,}", "" if task.total is None else f"/{int(task.total):,}"
        return Text(done + of, style="magenta")


class _EtaColumn(ProgressColumn):
    """Show the estimate that the caller gives, else rich's own."""

    def render(self, task: Task) -> Text:
        """Render."""
        given = task.fields["eta_sec"]
        return Text(f"{show_duration(task.time_remaining if given is None else given)} left", "cyan")


class _Display:
    """The live display of the process, with a line for each job under way.

    A terminal has one last line: a bar within another's is the second line of one display.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        wide = self.console.width >= _WIDE_COLUMNS
        self.progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            *([BarColumn(bar_width=20)] if wide else []),
            _CountColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", style="green", table_column=Column(no_wrap=True)),
            *([TimeElapsedColumn()] if wide else []),
            _EtaColumn(table_column=Column(no_wrap=True)),
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # it goes where the user sends it
        )
        self._drawn = 0.0

    def open(self) -> None:
        """Start the display on the terminal's last lines."""
        self.progress.start()
        self.console.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back
        print_through(self._print)

    def close(self) -> None:
        """End the display."""
        print_through(None)
        self.progress.stop()

    def _print(self, line: str) -> None:
        """Print above the bars; the terminal wraps, so that a path is copied in one piece."""
        self.console.print(Text(line), soft_wrap=True)

    def redraw(self, *, now: bool) -> None:
        """Draw if enough time has passed, or `now`."""
        moment = time.monotonic()
        if now or moment - self._drawn >= _REDRAW_SEC:
            self._drawn = moment
            self.progress.refresh()


_display: _Display | None = None


def _leave_to_parent() -> None:
    """Give a forked process, a loader's worker, the plain stderr: the display is its parent's."""
    global _display
    if _display is not None:
        _display = None
        print_through(None)
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_leave_to_parent)


class Bar:
    """A line of the display, while it is open; without a terminal it only estimates the time that is left."""

    def __init__(self, what: str, total: int | None) -> None:
        self.total = total
        self._what = what
        self._line: TaskID | None = None
        self._origin, self._is_first = (0, 0.0), True

    @contextmanager
    def opened(self, done: int = 0) -> Iterator[None]:
        """Show the bar, from `done` on."""
        global _display
        self._origin, self._is_first = (done, time.perf_counter()), True
        if not shows_bars():
            yield
            return
        owner = _display is None
        if owner:
            _display = _Display()
            _display.open()
        display = _display
        self._line = display.progress.add_task(self._what, total=self.total, completed=done, figures="", eta_sec=None)
        try:
            display.redraw(now=True)
            yield
        finally:
            display.progress.remove_task(self._line)
            self._line = None
            if owner:
                _display = None
                display.close()

    def advance(self, done: int) -> None:
        """Set the progress; drawn a few times a second."""
        if self._line is not None and _display is not None:
            _display.progress.update(self._line, completed=done, total=self.total)
            _display.redraw(now=False)

    def show(self, what: str, figures: str, eta_sec: float | None) -> None:
        """Set the texts, and draw."""
        if self._line is not None and _display is not None:
            _display.progress.update(self._line, description=what, figures=figures, eta_sec=eta_sec)
            _display.redraw(now=True)

    @property
    def is_shown(self) -> bool:
        """Whether it is on the screen."""
        return self._line is not None

    def remaining_sec(self, done: int) -> float | None:
        """Estimate the seconds from `done` to the end by the mean speed since the bar was opened; None at the start.

        The time before the first call is used for the first estimate only: compiling and starting workers happen once.
        """
        now = time.perf_counter()
        first, since = self._origin
        if self._is_first:
            self._origin, self._is_first = (done, now), False
        return (now - since) / (done - first) * (self.total - done) if done > first and self.total else None


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
