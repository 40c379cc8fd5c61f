"""The end of a small command, `python -m ...`: its exit status, and a user's mistake without a traceback."""

import sys
from collections.abc import Callable

from utils.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from utils.io.safe_text import safe_lines


def print_result(name: str, work: Callable[[], str]) -> int:
    """Print what `work` returns, or its UserError behind the command's name; returns the exit status."""
    try:
        sys.stdout.write(work() + "\n")
    except UserError as error:
        sys.stderr.write(safe_lines(f"{name}: {error}") + "\n")
        return EXIT_USER_ERROR
    return EXIT_OK
