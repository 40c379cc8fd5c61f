"""Work in processes that some items kill. Equality (with a plain map), property (each fatal item is told apart)."""

import os
import signal

import pytest

from utils.ranks.processes import map_in_processes


def square_or_die(number):
    """Return the square; end the process at a negative number."""
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_all_results_in_order_and_the_fatal_items_by_themselves():
    """The first two go to a process together, with others."""
    items = [-1, -2, *range(40)]
    found = list(map_in_processes(square_or_die, items, lambda item: ("fatal", item)))
    assert found == [("fatal", item) if item < 0 else item * item for item in items]


def fail(number):
    raise ValueError(f"item {number}")


def test_an_exception_is_passed_on():
    with pytest.raises(ValueError, match="item 0"):
        list(map_in_processes(fail, [0, 1], lambda item: None))
