"""The logger of all rooms: rank 0 logs everything, other ranks only warnings, and the run folder keeps a copy.

Arguments of a message (a path, an error) cannot start a new line, move the cursor or show a secret. Tables that our own
code formats are wrapped in `Lines`.
"""

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from logging.handlers import MemoryHandler
from typing import Any

from utils.io.safe_text import Lines, escape_controls, message_lines

ROOT = "atelier"
log = logging.getLogger(ROOT)  # of all modules


class _SafeFormatter(logging.Formatter):
    """Format a record without control characters or secrets; `mark` begins each line."""

    def __init__(self, form: str, mark: str = "") -> None:
        super().__init__(form)
        self._mark = mark

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record, which may have several lines."""
        record = copy.copy(record)
        record.exc_text = None  # cached by another formatter
        if isinstance(record.args, tuple):
            record.args = tuple(map(_on_one_line, record.args))
        return "\n".join(self._mark + line for line in message_lines(super().format(record)).split("\n"))


def _on_one_line(value: Any) -> Any:
    """Escape the control characters of texts, paths and errors. Other values quote their parts themselves."""
    if isinstance(value, Lines) or not isinstance(value, str | os.PathLike | BaseException):
        return value
    return escape_controls(str(value))


class _StderrHandler(logging.StreamHandler):
    """Write to the current sys.stderr: a progress bar replaces it, to show lines above itself."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


def environment_rank() -> int:
    """Return the rank from the launcher's variables, or 0 without a launcher. Needs no process group."""
    for variable in ("RANK", "SLURM_PROCID"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def restart_count() -> int:
    """Return how often SLURM has requeued this job, 0 without SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def own_place() -> str:
    """Return the prefix of this rank's lines; rank 0 has none."""
    rank = environment_rank()
    return f"[rank {rank}] " if rank else ""


def setup_logging() -> None:
    """Send messages to stderr: INFO and above from rank 0, warnings from other ranks, marked with their rank.

    DEBUG messages give reasons, such as for the value of an `auto`; log.txt alone has them.
    """
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = _StderrHandler()
    handler.setLevel(logging.WARNING if environment_rank() else logging.INFO)
    handler.setFormatter(_SafeFormatter("%(message)s", own_place()))
    log.addHandler(handler)
    log.addHandler(MemoryHandler(sys.maxsize, flushLevel=sys.maxsize))  # kept for log.txt


@contextmanager
def log_copied_to(stream: Any) -> Iterator[None]:
    """Copy rank 0's messages, earlier ones too, to a stream with time and level. Closes the stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    for early in [kept for kept in log.handlers if isinstance(kept, MemoryHandler)]:
        early.setTarget(handler)
        log.removeHandler(early)
        early.close()
    log.addHandler(handler)
    with closing(stream):
        try:
            yield
        finally:
            log.removeHandler(handler)
