"""One logger for all rooms: rank 0 logs everything, the others only warnings, and the run folder keeps a copy.

Arguments of a message (a path, an error) cannot start a new line, move the terminal's cursor or show a secret. A table
made by our code is wrapped in `Lines`.
"""

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from logging.handlers import MemoryHandler
from typing import Any

from utils.io.safe_text import Lines, escape_controls, safe_lines

ROOT = "atelier"


class _SafeFormatter(logging.Formatter):
    """Format a record without control characters and secrets of its arguments; `mark` begins each of its lines."""

    def __init__(self, form: str, mark: str = "") -> None:
        super().__init__(form)
        self._mark = mark

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or the lines where the message itself has several."""
        record = copy.copy(record)
        record.exc_text = None  # of another formatter
        if isinstance(record.args, tuple):
            record.args = tuple(map(_on_one_line, record.args))
        lines = safe_lines(super().format(record)).split("\n")
        return "\n".join(self._mark + line for line in lines)


def _on_one_line(value: Any) -> Any:
    """Escape the control characters of a text, a path or an error; leave numbers, and what shows its parts quoted."""
    if isinstance(value, Lines) or not isinstance(value, str | os.PathLike | BaseException):
        return value
    return escape_controls(str(value))


class _StderrHandler(logging.Handler):
    """Write to what sys.stderr is now: a progress bar replaces it, to show lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # as every handler of the standard library: a message that fails ends no run
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module (`get_logger(__name__)`)."""
    return logging.getLogger(f"{ROOT}.{name}")


def environment_rank() -> int:
    """Return this process's rank as its launcher states it, 0 where there is none. Works before any process group."""
    for variable in ("RANK", "SLURM_PROCID"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def is_launched() -> bool:
    """Return whether a launcher, torchrun or SLURM, has started this process."""
    return not {"RANK", "SLURM_PROCID"}.isdisjoint(os.environ)


def place_of(rank: int) -> str:
    """Return what marks a rank's lines: rank and node in a SLURM job of several ranks, else the rank if not 0."""
    node, ranks = os.environ.get("SLURMD_NODENAME"), os.environ.get("WORLD_SIZE")
    if node is not None and (ranks or os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        return f"[rank {rank} {node}] "
    return "" if rank == 0 else f"[rank {rank}] "


def setup_logging(rank: int | None = None, *, explain: bool = False) -> None:
    """Send messages to stderr: from rank 0 all but reasons, warnings from the others, marked with their rank.

    Reasons, such as those of an `auto`, are logged as DEBUG; log.txt has them, and stderr with `explain`.
    """
    rank = environment_rank() if rank is None else rank
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = _StderrHandler()
    shown = logging.DEBUG if explain else logging.INFO
    handler.setLevel(shown if rank == 0 else logging.WARNING)
    handler.setFormatter(_SafeFormatter("%(message)s", place_of(rank)))
    logger.addHandler(handler)
    logger.addHandler(MemoryHandler(sys.maxsize, flushLevel=sys.maxsize))  # for the log of a run folder


@contextmanager
def log_copied_to(stream: Any) -> Iterator[None]:
    """Copy rank 0's messages, with time and level, to a stream, earlier ones as well; close it at the end."""
    logger, handler = logging.getLogger(ROOT), logging.StreamHandler(stream)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    for early in [kept for kept in logger.handlers if isinstance(kept, MemoryHandler)]:
        early.setTarget(handler)
        logger.removeHandler(early)
        early.close()
    logger.addHandler(handler)
    with closing(stream):
        try:
            yield
        finally:
            logger.removeHandler(handler)
