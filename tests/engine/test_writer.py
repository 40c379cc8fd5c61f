"""The checkpoint writer, and what it stands on. Properties: a state is that of the moment it was given, one write at a
time, what the disk refuses is raised or retried, rows that it refuses come later and in order.
"""

import threading
from pathlib import Path

import pytest
import torch

from engine.writer import CheckpointWriter, HostCopies
from utils.errors import UserError
from utils.io.files import AppendFile


def groups(value):
    return {"task": {"w": torch.full((4, 3), value)}, "optimizer": {}}


def submit(writer, given, write, said="saved"):
    writer.submit(given, write, said, copied=False)


class Held:
    """A write that takes until it is let go."""

    def __init__(self):
        self.seen, self.go = [], threading.Event()

    def __call__(self, given):
        assert self.go.wait(20)
        self.seen.append(float(given["task"]["w"][0, 0]))


@pytest.mark.parametrize("in_background", [True, False])
def test_what_is_written_is_the_state_of_the_moment(in_background):
    writer, held, state = CheckpointWriter(in_background=in_background, retries=False), Held(), groups(1.0)
    if not in_background:
        held.go.set()
    submit(writer, state, held)
    state["task"]["w"].fill_(2.0)  # training goes on, in place
    held.go.set()
    writer.finish()
    assert held.seen == [1.0]


def test_one_write_is_under_way_at_most_and_memory_is_used_again():
    writer, held, order = CheckpointWriter(in_background=True, retries=False), Held(), []
    submit(writer, groups(1.0), held)
    kept = writer._copies._kept["task", "w"].data_ptr()
    threading.Timer(0.2, held.go.set).start()
    submit(writer, groups(2.0), lambda given: order.append(float(given["task"]["w"].sum())))
    assert held.seen == [1.0]
    writer.finish()
    assert order == [24.0] and writer._copies._kept["task", "w"].data_ptr() == kept


def refuse(given):
    raise UserError("run_dir: /x does not take it")


def test_a_refusal_is_raised_by_finish_and_stops_what_follows(log):
    writer, written = CheckpointWriter(in_background=True, retries=False), []
    assert not writer.failed
    submit(writer, groups(1.0), refuse)
    writer._thread.join()
    assert writer.failed
    submit(writer, groups(2.0), written.append)
    assert written == [] and "saved" not in log.text
    with pytest.raises(UserError, match="/x does not take it"):
        writer.finish()
    submit(writer, groups(3.0), refuse)
    writer.close()  # reports what it does not raise
    assert "/x does not take it" in log.text and not writer.failed


@pytest.mark.parametrize("in_background", [True, False])
def test_a_refusal_is_ignored_where_the_run_retries_but_not_at_the_end(in_background, log):
    writer, written = CheckpointWriter(in_background=in_background, retries=True), []
    submit(writer, groups(1.0), refuse)
    submit(writer, groups(2.0), written.append)
    assert not writer.failed and "(loop.on_failed_save=retry)" in log.text
    submit(writer, groups(3.0), refuse)
    assert len(written) == 1
    with pytest.raises(UserError):
        writer.finish()


def test_a_defect_is_always_raised():
    writer = CheckpointWriter(in_background=True, retries=True)
    submit(writer, groups(1.0), lambda given: given["nothing"])
    writer._thread.join()
    assert writer.failed
    with pytest.raises(KeyError):
        writer.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the first test does the same on a CPU")
def test_copies_from_a_gpu_are_of_the_moment_without_waiting():
    weights = torch.ones(4096, 4096, device="cuda")
    copies, event = HostCopies().take({"task": {"w": weights}})
    weights.fill_(2.0)
    event.synchronize()
    assert copies["task"]["w"].is_pinned() and bool((copies["task"]["w"] == 1).all())


# --- rows


def test_rows_that_the_disk_refuses_come_later_and_in_order(tmp_path, monkeypatch, log):
    path = tmp_path / "rows"
    rows = AppendFile(path)
    rows.write("a\n")
    real, rows._file = rows._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (every write: no space left)
    rows.write("b\n")
    rows.write("c\n")
    with pytest.raises(OSError, match="No space left"):
        rows.sync()
    assert path.read_text() == "a\n" and log.text.count("cannot be written (No space left on device)") == 1
    rows._file.close()
    rows._file = real
    rows.write("d\n")
    rows.sync()
    rows.close()
    assert path.read_text() == "a\nb\nc\nd\n"
    lost = AppendFile(Path("/dev/full"))
    lost.write("abc\n")
    lost.close()
    assert "/dev/full lacks its last 4 bytes" in log.text
