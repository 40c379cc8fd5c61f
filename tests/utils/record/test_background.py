"""A tracker in the background: the run never waits for it, and nothing that it meets ends the run."""

import logging
import threading

import numpy as np
import pytest

from utils.record import background
from utils.record.background import BackgroundTracker


class Recording:
    """A tracker that notes its calls, waits where it is told to, and fails at one step."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at
        self.go_on = threading.Event()
        self.go_on.set()

    def add_row(self, step, kind, figures):
        self.go_on.wait()
        self.calls.append((step, kind, figures))
        if step == self.fails_at:
            raise ConnectionError("gone")

    def add_image(self, step, name, image):
        self.calls.append((step, name, image.shape))

    def add_table(self, step, name, rows):
        self.calls.append((step, name, rows))

    def add_model(self, file, alias, metadata):
        self.calls.append((file, alias, metadata))

    def close(self, failed=False):
        self.calls.append(failed)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(background, "_STOP_SEC", 0.1)


def test_all_calls_arrive_in_their_order():
    inner = Recording()
    tracker = BackgroundTracker("W&B", lambda say: inner, 30.0)
    tracker.add_row(1, "train", {"loss": 0.5})
    tracker.add_image(1, "mistakes", np.zeros((2, 3, 3), np.uint8))
    tracker.add_table(1, "classes", [{"a": 1}])
    tracker.add_model("file", "best", {"step": 1})
    tracker.close(failed=True)
    assert inner.calls == [
        (1, "train", {"loss": 0.5}), (1, "mistakes", (2, 3, 3)), (1, "classes", [{"a": 1}]),
        ("file", "best", {"step": 1}), True,
    ]  # fmt: skip


def test_a_row_is_that_of_its_time():
    inner = Recording()
    inner.go_on.clear()
    tracker, figures = BackgroundTracker("W&B", lambda say: inner, 30.0), {"loss": 1.0}
    tracker.add_row(1, "train", figures)
    figures["loss"] = 2.0
    inner.go_on.set()
    tracker.close()
    assert inner.calls[0] == (1, "train", {"loss": 1.0})


def test_a_start_that_never_ends_holds_nothing_up(caplog):
    never = threading.Event()
    tracker = BackgroundTracker("W&B", lambda say: never.wait(), 30.0)
    for step in range(100):
        tracker.add_row(step, "train", {})
    tracker.close(goes_on=True)  # returns
    never.set()
    assert "W&B has not taken everything within 0.1 s; the rest is in the run folder" in caplog.text


def test_a_run_that_goes_on_later_waits_less(caplog):
    inner = Recording()
    inner.go_on.clear()
    tracker = BackgroundTracker("W&B", lambda say: inner, 30.0)
    tracker.add_row(1, "train", {})
    tracker.close(goes_on=True)
    assert not inner.calls and "W&B has not taken everything" in caplog.text
    inner.go_on.set()


def test_a_failure_is_named_once_and_the_rest_is_dropped(caplog):
    inner = Recording(fails_at=2)
    tracker = BackgroundTracker("W&B", lambda say: inner, 30.0)
    for step in (1, 2, 3):
        tracker.add_row(step, "train", {})
    tracker.close()
    assert [call[0] for call in inner.calls[:-1]] == [1, 2] and inner.calls[-1] is True  # closed, as failed
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "tracking: W&B failed (ConnectionError: gone) and is disabled; the run continues, and metrics.jsonl has every "
        "row"
    ]


def test_a_tracker_that_does_not_start_is_a_warning(caplog):
    def start(say):
        raise OSError("No space left on device")

    tracker = BackgroundTracker("TensorBoard", start, 30.0)
    tracker.add_row(1, "train", {})
    tracker.close()
    assert "tracking: TensorBoard failed (OSError: No space left on device) and is disabled" in caplog.text


def test_too_many_waiting_rows_are_a_failure(caplog, monkeypatch):
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    inner = Recording()
    inner.go_on.clear()
    tracker = BackgroundTracker("W&B", lambda say: inner, 30.0)
    for step in range(10):
        tracker.add_row(step, "train", {})
    inner.go_on.set()
    tracker.close()
    assert "tracking: W&B failed (3 figures and pictures wait for it) and is disabled" in caplog.text
    assert len(inner.calls) <= 5


def test_a_library_that_asks_to_exit_is_a_warning(caplog):
    def start(say):
        raise SystemExit(1)

    BackgroundTracker("W&B", start, 30.0).close()
    assert "tracking: W&B failed (SystemExit: 1) and is disabled" in caplog.text


def test_a_tracker_that_is_left_behind_is_known(monkeypatch):
    monkeypatch.setattr(background, "_unfinished", set())
    inner = Recording()
    inner.go_on.clear()
    tracker = BackgroundTracker("W&B", lambda say: inner, 0.1)
    tracker.add_row(1, "train", {})
    tracker.close()
    assert background.has_unfinished()
    inner.go_on.set()
    tracker._thread.join(10)
    assert not background.has_unfinished()


def test_the_main_thread_logs_what_the_tracker_says(caplog):
    caplog.set_level(logging.INFO)

    def start(say):
        say("W&B: http://server/run")
        return Recording()

    BackgroundTracker("W&B", start, 30.0).close()
    (record,) = [record for record in caplog.records if "http://server/run" in record.message]
    assert record.threadName == threading.current_thread().name
