"""Stop on request. Properties of a process that gets signals; exit statuses and messages."""

from tests.support import command

BEGIN = """
import os, signal, time
from utils.ranks import signals
def send(number):
    os.kill(os.getpid(), number)
with signals.StopRequest() as stop:
    assert not signals.is_stop_requested()
    send(signal.SIGTERM)
    assert stop.requested and signals.is_stop_requested()
"""


def run(code):
    """Return the exit status and what was said."""
    done = command("python", "-c", BEGIN + code)
    return done.returncode, done.stderr


def test_a_signal_that_a_launcher_passes_on_is_no_second_request():
    status, said = run("    send(signal.SIGTERM); send(signal.SIGUSR1)\nassert not signals.is_stop_requested()")
    assert (status, said) == (0, "SIGTERM: finishing the step, then saving; once more leaves at once\n")


def test_a_second_ctrl_c_leaves_at_once():
    status, said = run("    time.sleep(1.1); send(signal.SIGINT); time.sleep(60)")
    assert status == 75 and said.splitlines()[1:] == ["SIGINT again: leaving at once, without saving"]


def test_works_without_a_listener():
    """Whoever read stderr may have got the signal too."""
    status, _ = run("    signals.REPEAT_SEC = 0; os.close(2); send(signal.SIGTERM)")
    assert status == 75
