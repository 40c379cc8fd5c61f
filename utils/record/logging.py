"""One logger for all rooms: rank 0 logs everything, the others only warnings, and the run folder keeps a copy.

Arguments of a message (a path, an error) cannot start a new line, move the terminal's cursor or show a secret. A table
made by our code is wrapped in `Lines`.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.io.safe_text import Lines, escape_controls, safe_lines

ROOT = "atelier"

_printer: Callable[[str], None] | None = None  # prints lines while a progress bar uses the terminal


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
        elif isinstance(record.args, dict):
            record.args = {name: _on_one_line(value) for name, value in record.args.items()}
        lines = safe_lines(super().format(record)).split("\n")
        return "\n".join(self._mark + line for line in lines)


def _on_one_line(value: Any) -> Any:
    """Escape the control characters of a text, a path or an error; leave numbers, and what shows its parts quoted."""
    if isinstance(value, Lines) or not isinstance(value, str | os.PathLike | BaseException):
        return value
    return escape_controls(str(value))


class _StderrHandler(logging.StreamHandler):
    """Write to stderr, or above the progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if _printer is None:
            super().emit(record)
            return
        try:
            _printer(self.format(record))
        except Exception:  # as every handler of the standard library: a message that fails ends no run
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """Write to a file. Messages that the disk refuses are lost, with one warning; the run continues."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn of a disk that takes no more; show the traceback of other errors, which are defects."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._refused:
            self._refused = True
            text = "%s cannot be written (%s); messages are on stderr only"
            get_logger(__name__).warning(text, self.baseFilename, error.strerror or error)

    def close(self) -> None:
        """Close the file, which writes what its buffer still holds."""
        with suppress(OSError):
            super().close()


class _EarlyRecords(logging.Handler):
    """Keep the messages from before the run folder is open, for its log."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.records.append(record)


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
    for name in logging.root.manager.loggerDict:
        if name.split(".")[0] == ROOT:  # Hydra's `disabled` logging switches off every logger that it finds
            logging.getLogger(name).disabled = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    stream = _StderrHandler(sys.stderr)
    shown = logging.DEBUG if explain else logging.INFO
    stream.setLevel(shown if rank == 0 else logging.WARNING)
    stream.setFormatter(_SafeFormatter("%(message)s", place_of(rank)))
    logger.addHandler(stream)
    logger.addHandler(_EarlyRecords())


def print_through(printer: Callable[[str], None] | None) -> None:
    """Give the lines meant for stderr to `printer` from now on; None: to stderr again."""
    global _printer
    _printer = printer


def log_to_file(path: Path) -> logging.Handler:
    """Copy rank 0's messages, with time and level, to a file, earlier ones as well.

    Returns the handler for `stop_logging_to`.
    """
    handler = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(ROOT)
    for early in [kept for kept in logger.handlers if isinstance(kept, _EarlyRecords)]:
        for record in early.records:
            handler.handle(record)
        logger.removeHandler(early)
    logger.addHandler(handler)
    return handler


def stop_logging_to(handler: logging.Handler) -> None:
    """End a copy that `log_to_file` began."""
    logging.getLogger(ROOT).removeHandler(handler)
    handler.close()
