"""The journal of a command: what a killed process leaves, whose parts count, and the lock."""

import os

import pytest

from tests.support import refuses
from utils.io.journal import open_journal


class Killed(Exception):
    pass


def leave(output, *parts, command="a", **where):
    with pytest.raises(Killed), open_journal("output", output, command, **where) as journal:
        for part in parts:
            journal.add(part)
        raise Killed


def parts_of(output, command="a"):
    with open_journal("output", output, command) as journal:
        return list(journal.parts())


def test_whole_parts_of_the_same_command_stay(tmp_path):
    output, file = tmp_path / "x.csv", tmp_path / ".x.csv.journal"
    leave(output, ["a\nb\u2028"], {"é": 0.1})
    with open(file, "a") as stream:
        stream.write('["to')  # torn
    leave(output, 3)
    assert parts_of(output) == [["a\nb\u2028"], {"é": 0.1}, 3]
    assert parts_of(output, "b") == [] and not file.exists()
    leave(output, 1)
    assert parts_of(output) == [1]
    assert not any(tmp_path.iterdir())


def test_a_second_writer_is_refused_and_temporary_files_of_killed_ones_are_removed(tmp_path):
    for name in (".x.csv.12.tmp", ".y.csv.12.tmp", "x.csv.12.tmp"):
        (tmp_path / name).touch()
    with open_journal("output", tmp_path / "x.csv"), refuses(r"^output: .*x\.csv"):
        parts_of(tmp_path / "x.csv")
    assert sorted(os.listdir(tmp_path)) == [".y.csv.12.tmp", "x.csv.12.tmp"]
    with open_journal("output", tmp_path, is_folder=True):
        assert sorted(os.listdir(tmp_path)) == [".journal", "x.csv.12.tmp"]


def test_a_part_that_a_full_disk_cuts_off_is_none(tmp_path):
    with pytest.raises(Killed), open_journal("output", tmp_path / "x.csv") as journal:
        with open(journal.path, "a") as stream:
            stream.write('["to')
        raise Killed
    assert not journal.path.exists()
