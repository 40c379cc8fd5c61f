"""What was made of a file is used until the file changes, whatever was killed or damaged."""

import os
from pathlib import Path

import pytest

from data.images.record_store import Store
from utils.io import memo
from utils.io.files import sha256_file
from utils.io.memo import OURS, files_key, hash_once, in_threads, measure_once, own_cache


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_a_cache_that_the_user_may_not_write_is_in_a_folder_of_his_own(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    memo._find_own.cache_clear()
    assert own_cache(OURS / "x") == OURS / "x" and own_cache(Path("named")) == Path("named")
    (OURS / "ab").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, *_, **__: "outputs" not in str(path))
    assert own_cache(OURS / "ab") == tmp_path / "home/atelier/ab"
    assert log.text.count("XDG_CACHE_HOME") == 1
    store = Store(OURS)  # reads what another user has written
    (OURS / "ab/abc").write_bytes(b"theirs")
    store.put("abd", b"ours")
    assert store.get("abd").tobytes() == b"ours" and {file.name for file in store.files()} == {"abc", "abd"}
    memo._find_own.cache_clear()


def test_only_changed_files_are_measured_again(files, tmp_path):
    store, measured = tmp_path / "cache/values.jsonl", []

    def measure(path):
        measured.append(path.name)
        return path.read_text() * 2 if path.name != "c" else None

    def values(paths):
        measured.clear()
        return measure_once(paths, lambda missing: in_threads(measure, missing), store, "measuring")

    assert values([files[0], *files]) == ["aa", "aa", "bb", None] and sorted(measured) == ["a", "b", "c"]
    files[1].write_text("other")
    assert values(files) == ["aa", "otherother", None] and sorted(measured) == ["b", "c"]  # None is not kept
    times = files[0].stat()
    files[0].write_text("x")  # of the same size, and with its time set back
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert values(files[:1]) == ["xx"]
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        values(files)


def test_a_file_of_this_moment_may_change_within_a_tick_of_the_clock(files, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.io.memo._YOUNG_SEC", 3600)
    for value in "xy":
        assert measure_once(files[:1], lambda missing: [value], tmp_path / "values.jsonl", "") == [value]  # noqa: B023
    assert files_key(files) != files_key(files)


def test_a_killed_process_loses_at_most_the_value_that_it_was_writing(files, tmp_path):
    store = tmp_path / "values.jsonl"

    def killed(missing):
        yield "first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_once(files, killed, store, "measuring")
    store.write_text(store.read_text() + store.read_text().strip()[:-4].replace('/a"', '/b"'))  # torn
    assert measure_once(files, lambda missing: [path.name for path in missing], store, "")[1:] == ["b", "c"]
    assert measure_once(files, lambda missing: [], store, "") == ["first", "b", "c"]


def test_a_file_that_changes_while_it_is_measured_is_measured_again(files, tmp_path):
    store = tmp_path / "values.jsonl"

    def measure(missing):
        for path in missing:
            value = path.read_text()
            path.write_text("changed")
            yield value

    assert measure_once(files[:1], measure, store, "") == ["a"]
    assert measure_once(files[:1], measure, store, "") == ["changed"]


def test_a_store_that_cannot_be_written_is_a_warning(files, tmp_path, caplog):
    store = files[0] / "values.jsonl"
    assert hash_once(files[1], store) == sha256_file(files[1]) == hash_once(files[1], store)
    assert "cannot be written" in caplog.text
