"""The errors and exit statuses that a user meets.

`UserError` is what a user can cause and mend: it is shown as its message alone, without a traceback. Every other
exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_LOST_RANK = 70
EXIT_STOPPED = 75

_SHOWN = 20  # names in a message


class UserError(ValueError):
    """Tell the user which key or file is wrong, what was found, what is allowed and what to do."""


def close_names(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return `close: a, b` for the nearest known names, or all of them (the first of many) where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=most, cutoff=0.5)
    if near:
        return "close: " + ", ".join(near)
    more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
    return "known: " + ", ".join(known[:_SHOWN]) + more
