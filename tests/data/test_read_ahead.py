"""Reading ahead changes neither batches nor their order, asks in time, survives any file, and ends with its reader."""

import itertools
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

from data import read_ahead
from data.read_ahead import ReadAhead, will_need, with_coming
from data.source import FileRange
from data.stream import Draw

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")


def batches(size, count=None):
    """Yield batches of draws whose index counts on."""
    numbers = itertools.count() if count is None else range(count)
    return ([Draw(index, index, 0) for index in range(n * size, (n + 1) * size)] for n in numbers)


def file_of(row):
    return FileRange(Path(f"{row}.png"))


class Asked:
    """Stands for the system: notes what it is asked for."""

    def __init__(self):
        self.files, self.changed = set(), threading.Condition()

    def __call__(self, file):
        with self.changed:
            self.files.add(int(Path(file.path).stem))
            self.changed.notify()

    def wait_for(self, indices):
        with self.changed:
            assert self.changed.wait_for(lambda: self.files >= set(indices), timeout=30)


def threads_of_ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.fixture
def asked(monkeypatch):
    """Return what notes the files; it waits for the threads at the end, which would tell the next test's."""
    asked = Asked()
    monkeypatch.setattr(read_ahead, "will_need", asked)
    yield asked
    for thread in threads_of_ours():
        thread.join(timeout=30)


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_batches_are_handed_on_as_they_are(asked, size):
    assert list(ReadAhead(batches(size, 9), file_of)) == list(batches(size, 9))
    assert list(ReadAhead([], file_of)) == []


@pytest.mark.parametrize("size", [1, 64, 300])
def test_files_are_asked_for_some_hundred_before_they_are_read(asked, size):
    stream = iter(ReadAhead(batches(size), file_of))
    for number in range(3):
        first = next(stream)[0].index
        assert first == number * size
        asked.wait_for(range(first + read_ahead._FILES))
        assert max(asked.files) < first + read_ahead._FILES + 2 * size, "no more than a batch beyond"
    stream.close()


def test_its_threads_end_with_the_stream(asked):
    stream = iter(ReadAhead(batches(64), file_of))
    next(stream)
    threads = threads_of_ours()
    assert threads
    stream.close()
    for thread in threads:
        thread.join(timeout=30)
    assert not threads_of_ours()


def test_the_system_is_asked_for_the_whole_file_or_a_part(tmp_path, monkeypatch):
    asked, file = [], tmp_path / "x.png"
    file.write_bytes(b"content")
    monkeypatch.setattr(os, "posix_fadvise", lambda opened, *how: asked.append((os.fstat(opened).st_ino, *how)))
    will_need(FileRange(file))
    will_need(FileRange(file, 3, 2))
    assert asked == [(file.stat().st_ino, *part, os.POSIX_FADV_WILLNEED) for part in ((0, 0), (3, 2))]


def test_neighbours_in_a_shard_are_one_request(tmp_path, monkeypatch):
    asked, read, shard = [], [], tmp_path / "0.tar"
    shard.touch()
    monkeypatch.setattr(os, "posix_fadvise", lambda opened, *part: asked.append(part[:2]))
    monkeypatch.setattr(os, "pread", lambda opened, *part: read.append(part))
    stream = ReadAhead(
        batches(3, 1), lambda row: FileRange(shard, row * 20_000, 10_000), lambda batch: list(range(100, 180))
    )
    end = time.monotonic() + 30
    for batch in stream:  # at its end, what nobody has begun is not asked for
        assert batch == next(iter(batches(3, 1)))
        while len(asked) + len(read) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert asked == [(0, 50_000)] and read == [(2**20, 2_000_000), (1_590_000 - 2**20, 2_000_000 + 2**20)]


def test_any_file_may_be_asked_for(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for name in ("empty", "folder", "pipe", "loop", "absent"):
        will_need(FileRange(tmp_path / f"{name}.png", -512))
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_system_that_cannot_be_asked_gets_the_batches(asked, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert list(ReadAhead(batches(5, 3), file_of)) == list(batches(5, 3))
    assert not asked.files


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_knows_the_next_one_of_its_worker(workers):
    found, stride = list(with_coming(batches(2, 5), workers)), max(workers, 1)
    assert found == list(batches(2, 5))
    assert [list(pickle.loads(pickle.dumps(batch)).coming) for batch in found] == found[stride:] + [[]] * stride
