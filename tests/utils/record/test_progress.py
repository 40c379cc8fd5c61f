"""The progress bar: what a terminal shows, and that nothing is shown elsewhere."""

import io
import logging
import multiprocessing
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import set_variables
from utils.record import progress
from utils.record.logging import log, setup_logging
from utils.record.progress import Bar, track


class Terminal(io.TextIOWrapper):
    """A file that passes for a terminal, in place of stderr."""

    def isatty(self):
        return True

    @property
    def text(self):
        return Path(self.buffer.name).read_text()


@contextmanager
def shown_on(stream):
    """Let stderr and the log go to a stream, in the body of a test: behind a fixture, pytest sets its own stderr."""
    with pytest.MonkeyPatch.context() as patch:
        logger = logging.getLogger("atelier")
        patch.setattr(sys, "stderr", stream)
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "propagate", logger.propagate)
        patch.setattr(progress, "_console", Console(stderr=True, soft_wrap=True))  # it looks for a terminal now
        setup_logging()
        yield


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """Return a terminal of 120 columns, on which every change is drawn."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_REDRAW_SEC", 0.0)
    with open(tmp_path / "terminal", "wb", buffering=0) as file:
        yield Terminal(file, "utf-8", write_through=True)


def test_bars_have_lines_of_their_own_and_log_lines_stand_whole_above_them(terminal):
    long = "saved /" + "x" * 200
    with shown_on(terminal):
        bar = Bar("training", 1200)
        with bar.opened(40):
            for step in range(41, 44):
                bar.advance(step)
                log.info("step %d  [bold]loss[/bold] 0.5", step)
            bar.advance(43, description="epoch 3/20", figures="train loss 0.1234")
            log.info(long)
            print("a library's own warning", file=sys.stderr)
            assert list(track("abc", 3, "evaluating val")) == ["a", "b", "c"]
            assert bar.left_sec > 0
            bar.advance(44)
        log.info("the end")
        assert sys.stderr is terminal and not progress._console._live_stack
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text)  # without colours and moves
    said = [f"step {step}  [bold]loss[/bold] 0.5" for step in (41, 42, 43)]
    said += [long, "a library's own warning", "the end"]  # the terminal wraps a long line, not we
    assert [line for line in re.split(r"[\r\n]+", drawn) if line in said] == said
    assert re.search(r"epoch 3/20 .* 43/1200 train loss 0.1234 +\d+:\d\d", drawn)
    assert drawn.rindex("44/1200") > drawn.rindex("evaluating val")
    assert terminal.text.index("\x1b[?25h") < terminal.text.index("41/1200")  # the cursor is not hidden


def write_from_worker():
    sys.stderr.write("from the worker\n")
    log.warning("logged by the worker")
    sys.stderr.flush()
    os._exit(0)


def test_a_forked_worker_leaves_the_terminal_to_its_parent(terminal):
    with shown_on(terminal), Bar("training", 10).opened():
        worker = multiprocessing.get_context("fork").Process(target=write_from_worker)
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0 and progress._console._live_stack
    assert "from the worker" in terminal.text and "logged by the worker" in terminal.text


@pytest.mark.parametrize("where", ["no terminal", "another rank", "dumb"])
def test_elsewhere_nothing_is_shown(where, terminal, monkeypatch):
    set_variables(monkeypatch, {"no terminal": {}, "another rank": {"RANK": "1"}, "dumb": {"TERM": "dumb"}}[where])
    stderr = io.StringIO() if where == "no terminal" else terminal
    with shown_on(stderr):
        bar = Bar("training", 10)
        with bar.opened():
            bar.advance(1)
            bar.advance(1, description="epoch 1/1", figures="loss 1")
            assert list(track(range(3), 3, "evaluating")) == [0, 1, 2]
            bar.advance(2)
            assert sys.stderr is stderr and bar.left_sec is not None
    assert terminal.text == "" and (where != "no terminal" or stderr.getvalue() == "")
