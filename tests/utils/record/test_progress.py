"""The progress bar: what a terminal shows (a pseudo-terminal), and that nothing is shown elsewhere."""

import io
import logging
import multiprocessing
import os
import pty
import re
import sys
import threading

import pytest
from rich.console import Console

from utils.record import progress
from utils.record.logging import get_logger, setup_logging
from utils.record.progress import Bar, track


class Terminal:
    """A pseudo-terminal in place of stderr; `text` is what reached it."""

    def __init__(self):
        self._master, slave = pty.openpty()
        self.stream, self._seen = os.fdopen(slave, "w"), []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while data := os.read(self._master, 65536):
                self._seen.append(data)
        except OSError:  # the other end is closed
            return

    def __enter__(self):
        # In the test's body, not in a fixture: pytest puts its own stderr in place between the two.
        logger = logging.getLogger("atelier")
        self._before = sys.stderr, list(logger.handlers), logger.propagate
        sys.stderr, logger.handlers[:] = self.stream, []
        progress._console = Console(stderr=True, soft_wrap=True)  # which looks for a terminal when it is made
        setup_logging()
        return self

    def __exit__(self, *error):
        logger = logging.getLogger("atelier")
        sys.stderr, logger.handlers[:], logger.propagate = self._before
        self.stream.close()
        self._reader.join(5)

    @property
    def text(self):
        return b"".join(self._seen).decode()

    @property
    def drawn(self):
        """What was drawn, without colours and moves."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)


@pytest.fixture
def terminal(monkeypatch):
    """Return a terminal of 120 columns, on which every change is drawn."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_REDRAW_SEC", 0.0)
    return Terminal()


def test_bars_have_lines_of_their_own_and_log_lines_stand_whole_above_them(terminal):
    long = "saved /" + "x" * 200
    with terminal:
        bar = Bar("training", 1200)
        with bar.opened(40):
            for step in range(41, 44):
                bar.advance(step)
                get_logger("test").info("step %d  [bold]loss[/bold] 0.5", step)
            bar.advance(43, description="epoch 3/20", figures="train loss 0.1234")
            get_logger("test").info(long)
            print("a library's own warning", file=sys.stderr)
            assert list(track("abc", 3, "evaluating val")) == ["a", "b", "c"]
            assert bar.left_sec > 0
            bar.advance(44)
        get_logger("test").info("the end")
        assert sys.stderr is terminal.stream and not progress._console._live_stack
    drawn = terminal.drawn
    said = [f"step {step}  [bold]loss[/bold] 0.5" for step in (41, 42, 43)]
    said += [long, "a library's own warning", "the end"]  # the terminal wraps a long line, not we
    assert [line for line in re.split(r"[\r\n]+", drawn) if line in said] == said
    assert re.search(r"epoch 3/20 .* 43/1200 train loss 0.1234 +\d+:\d\d", drawn)
    assert drawn.rindex("44/1200") > drawn.rindex("evaluating val")
    assert terminal.text.index("\x1b[?25h") < terminal.text.index("41/1200")  # the cursor is not hidden


def write_from_worker():
    sys.stderr.write("from the worker\n")
    get_logger("test").warning("logged by the worker")
    sys.stderr.flush()
    os._exit(0)


def test_a_forked_worker_leaves_the_terminal_to_its_parent(terminal):
    with terminal, Bar("training", 10).opened():
        worker = multiprocessing.get_context("fork").Process(target=write_from_worker)
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0 and progress._console._live_stack
    assert "from the worker" in terminal.text and "logged by the worker" in terminal.text


@pytest.mark.parametrize("where", ["no terminal", "another rank", "dumb"])
def test_elsewhere_nothing_is_shown(where, terminal, monkeypatch):
    variables = {"no terminal": {}, "another rank": {"RANK": "1"}, "dumb": {"TERM": "dumb"}}
    for name, value in variables[where].items():
        monkeypatch.setenv(name, value)
    with terminal:
        stderr = sys.stderr = io.StringIO() if where == "no terminal" else terminal.stream
        bar = Bar("training", 10)
        with bar.opened():
            bar.advance(1)
            bar.advance(1, description="epoch 1/1", figures="loss 1")
            assert list(track(range(3), 3, "evaluating")) == [0, 1, 2]
            bar.advance(2)
            assert sys.stderr is stderr and bar.left_sec is not None
    assert terminal.text == "" and (where != "no terminal" or stderr.getvalue() == "")
