"""Reading ahead changes neither batches nor their order, asks in time, survives any file, and ends with its reader."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from data.stream import read_ahead as module
from data.stream.order import Draw
from data.stream.read_ahead import read_ahead, will_need
from data.stream.source import FileRange, Source


def batches(size, count=None):
    """Yield batches of draws whose index counts on."""
    numbers = itertools.count() if count is None else range(count)
    return ([Draw(index, index, 0) for index in range(n * size, (n + 1) * size)] for n in numbers)


class Files(Source):
    """A store of files, each named by its row."""

    def file_of(self, row):
        return FileRange(f"{row}.png")


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
    monkeypatch.setattr(module, "will_need", asked)
    yield asked
    for thread in threads_of_ours():
        thread.join(timeout=30)


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_batches_are_handed_on_as_they_are(asked, size, monkeypatch):
    assert list(read_ahead(batches(size, 9), Files())) == list(batches(size, 9))
    assert list(read_ahead(batches(size, 9), Source())) == list(batches(size, 9))  # a store without files
    asked.wait_for(range(size))
    monkeypatch.delattr(os, "posix_fadvise")
    asked.files.clear()
    assert list(read_ahead(batches(size, 3), Files())) == list(batches(size, 3))


@pytest.mark.parametrize("size", [1, 300])
def test_files_are_asked_for_some_hundred_before_they_are_read_until_the_stream_ends(asked, size):
    stream = read_ahead(batches(size), Files())
    for number in range(3):
        first = next(stream)[0].index
        assert first == number * size
        asked.wait_for(range(first + module._FILES))
        assert max(asked.files) < first + module._FILES + 2 * size, "no more than a batch beyond"
    threads = threads_of_ours()
    assert threads
    stream.close()
    for thread in threads:
        thread.join(timeout=30)
    assert not threads_of_ours()


def test_any_file_may_be_asked_for(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for name in ("empty", "folder", "pipe", "absent"):
        will_need(FileRange(tmp_path / f"{name}.png", -512))
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) == open_before
