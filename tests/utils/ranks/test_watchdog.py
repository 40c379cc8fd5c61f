"""The watchdog's verdicts on one process. Whole jobs: tests/distributed/test_launch.py."""

import os
import signal
import threading
import time

import pytest

from utils.ranks.signals import StopRequest
from utils.ranks.watchdog import Watchdog


class Recorded(Watchdog):
    """A watchdog that remembers its verdict and stops, where others end the process; twenty rounds a second."""

    def __init__(self, timeout_sec):
        super().__init__(timeout_sec)
        self.interval_sec = 0.05
        self.verdict = None

    def _end(self, verdict):
        self.verdict = verdict
        self.abandon()


class Gone:
    """A store whose owner has ended."""

    def set(self, *_):
        raise ConnectionError

    get = set


def watch(watchdog):
    """Let it watch from a thread, as start() does; returns the thread."""
    thread = threading.Thread(target=watchdog._watch, daemon=True)
    thread.start()
    return thread


def test_one_rank_that_makes_no_progress_is_named_with_its_place():
    watchdog = Recorded(0.5)
    watchdog.start()
    for step in range(10):  # longer than the time-out, but never without progress for so long
        watchdog.progress(f"step {step}: loading")
        time.sleep(0.1)
    assert watchdog.verdict is None
    watchdog._thread.join(20)
    assert watchdog.verdict == "rank 0 hangs in 'step 9: loading': no progress for 0 s"
    assert watchdog.name_lost_ranks() is None


def test_it_ends_with_the_run():
    watchdog = Recorded(0.5)
    watchdog.start()
    thread = watchdog._thread
    watchdog.stop()
    assert not thread.is_alive() and watchdog.verdict is None


def test_a_process_that_was_stopped_meanwhile_does_not_hang(monkeypatch):
    """Ctrl-Z, a scheduler that suspends: the clock goes on and the process does not."""
    now, jump = time.monotonic, [0.0]
    monkeypatch.setattr("utils.ranks.watchdog.time.monotonic", lambda: now() + jump[0])
    watchdog = Recorded(2.0)
    watchdog.start()
    time.sleep(0.3)
    jump[0] = 1000.0
    time.sleep(0.3)
    watchdog.stop()
    assert watchdog.verdict is None


def test_without_its_store_a_job_is_over_after_some_rounds():
    watchdog = Recorded(30.0)
    watchdog._store = Gone()
    begun = time.monotonic()
    watch(watchdog).join(20)
    assert watchdog.verdict == "rank 0 is gone: its key-value store does not answer (ConnectionError)"
    assert time.monotonic() - begun > 3 * watchdog.interval_sec


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_without_its_store_a_rank_that_was_asked_to_stop_has_the_time_to_save(number):
    watchdog = Recorded(1.5)
    watchdog._store = Gone()
    with StopRequest():
        os.kill(os.getpid(), number)
        thread = watch(watchdog)
        time.sleep(1.0)
        assert watchdog.verdict is None
        thread.join(20)
    assert watchdog.verdict.startswith("rank 0 is gone")
