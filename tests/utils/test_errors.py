"""A loader worker that was killed is named with what to do, in whatever form its end shows."""

import signal

import pytest

from utils.errors import lost_worker

DEAD = {
    "DataLoader worker (pid 12) is killed by signal: Killed. ": "worker 12 of this rank has ended (is killed by",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": "worker 12, 13 of this rank has ended (exited un",
}


@pytest.mark.parametrize(("said", "named"), DEAD.items())
def test_a_dead_worker_becomes_advice_also_where_another_error_follows(said, named):
    message = lost_worker(RuntimeError(said))
    assert message.startswith("runtime.workers: ") and named in message
    assert lost_worker(RuntimeError("shapes differ")) is None and lost_worker(KeyError(said)) is None
    following = AttributeError("what was being read")
    following.__context__ = RuntimeError(said)
    assert lost_worker(following) == message


def test_a_broken_connection_waits_for_the_report_of_the_worker_that_ended(monkeypatch):
    def report(number, frame):
        raise RuntimeError(next(iter(DEAD)))

    broken, before = ConnectionResetError(), signal.signal(signal.SIGALRM, report)
    signal.setitimer(signal.ITIMER_REAL, 0.02)  # as SIGCHLD comes, which torch handles
    try:
        assert lost_worker(broken) is not None
    finally:
        signal.signal(signal.SIGALRM, before)
    monkeypatch.setattr("utils.errors._END_REPORTED_SEC", 0.0)
    assert lost_worker(broken) is not None and lost_worker(ConnectionResetError()) is None
