"""Files that are whole or absent. Properties: a failed write leaves the old file and nothing else; one spelling."""

import hashlib
import json
import os

import pytest

from utils.io.files import (
    canonical_json,
    link_or_copy,
    read_json,
    sha256_file,
    sha256_text,
    write_atomically,
    write_json,
    write_text,
)


def test_writing_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a/b/c.txt"
    write_text(path, "first é\n")
    write_text(path, "second")
    assert path.read_bytes() == b"second" and [file.name for file in path.parent.iterdir()] == ["c.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary):
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_write_that_fails_before_it_makes_a_file_says_why(tmp_path):
    def fail(temporary):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_atomically(tmp_path / "file.txt", fail)
    assert not list(tmp_path.iterdir())


def test_json_round_trips_and_is_readable(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": "é\n"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value and '"a": "é\\n"' in text and text.endswith("}\n")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert read_json(tmp_path / "x.json") == 1 and len(list(tmp_path.iterdir())) == 1


def test_canonical_json_has_one_spelling():
    assert (
        canonical_json({"b": 1, "a": [1.5, "é"]})
        == '{"a":[1.5,"\\u00e9"],"b":1}'
        == canonical_json(json.loads('{"a": [1.5, "é"], "b": 1}'))
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("inf"))


def test_hashes_are_those_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes("é".encode())
    assert sha256_file(tmp_path / "x") == sha256_text("é") == hashlib.sha256("é".encode()).hexdigest()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_link_replaces_the_old_file_and_a_copy_does_where_there_are_no_links(has_links, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "folder/target"
    source.write_bytes(b"new")
    target.parent.mkdir()
    target.write_bytes(b"old")
    if not has_links:

        def refuse(*arguments, **named):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, target)
    assert target.read_bytes() == b"new" and target.samefile(source) == has_links
    assert [file.name for file in target.parent.iterdir()] == ["target"]
    source.unlink()
    assert target.read_bytes() == b"new"
