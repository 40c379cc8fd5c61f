"""The watchdog's verdicts on one process. Whole jobs: tests/distributed/test_launch.py."""

import os
import signal
import threading
import time

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


def test_without_its_store_a_rank_that_was_asked_to_stop_has_the_time_to_save():
    watchdog = Recorded(1.5)
    watchdog._store = Gone()
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        thread = watch(watchdog)
        time.sleep(1.0)
        assert watchdog.verdict is None
        thread.join(20)
    assert watchdog.verdict == "rank 0 hangs in 'starting': no progress for 2 s"


def test_a_rank_without_a_sign_of_life_and_one_that_stays_behind_are_named():
    watchdog = Recorded(10.0)
    watchdog._store = Gone()
    assert watchdog._judge({0: "1|5|saving", 1: "1|4|step 3", 2: "1|5|saving"}, 0.0) is None
    assert watchdog._judge({0: "2|5|saving", 1: "2|4|step 3", 2: "2|5|saving"}, 9.0) is None
    assert watchdog._judge({0: "3|5|saving", 1: "3|4|step 3", 2: "3|6|saving"}, 11.0) is None
    verdict = watchdog._judge({0: "4|5|saving", 1: "4|4|step 3", 2: "4|6|saving"}, 21.0)
    assert verdict == "rank 1 hangs in 'step 3': no progress for 10 s"
    verdict = watchdog._judge({0: "5|7|step 9", 1: "5|7|step 9", 2: "4|6|saving"}, 32.0)
    assert verdict == "rank 2 has died or was stopped: no sign of life for 11 s"
