"""Errors name their key; a loader worker that was killed is named with what to do, in whatever form its end shows."""

import pytest

from utils.errors import find_lack, lost_worker

DEAD = {
    "DataLoader worker (pid 12) is killed by signal: Killed. ": "worker 12 of this rank has ended (is killed by",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": "worker 12, 13 of this rank has ended (exited un",
}


@pytest.mark.parametrize("said, named", DEAD.items())
def test_a_dead_worker_becomes_advice_also_where_another_error_follows(said, named):
    message = lost_worker(RuntimeError(said))
    assert message.startswith("runtime.workers: ") and named in message
    assert lost_worker(RuntimeError("shapes differ")) is None and lost_worker(KeyError(said)) is None
    following = AttributeError("what was being read")
    following.__context__ = RuntimeError(said)
    assert lost_worker(following) == message


def test_a_limit_of_the_shell_is_named():
    for error, limit in (
        (MemoryError(), "ulimit -v"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "ulimit -v"),
        (OSError(27, "File too large"), "ulimit -f"),
    ):
        assert limit in find_lack(error)
    assert find_lack(KeyError("x")) is None
