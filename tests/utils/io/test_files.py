"""Files that are whole or absent: a failed write leaves the old file and nothing else; one spelling of JSON."""

import json
import os

import pytest

from utils.io.files import canonical_json, link_or_copy, read_json, write_atomically, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary):
        assert temporary.parent == path.parent and path.read_text() == "old"
        temporary.write_text("half")
        raise OSError("why")

    with pytest.raises(OSError, match="why"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_json_is_readable_has_one_canonical_spelling_and_no_nan(tmp_path):
    path, value = tmp_path / "x.json", {"b": [1, 2.5, None, True], "a": "é\n"}
    write_json(path, value)
    assert read_json(path) == value and '"a": "é\\n"' in path.read_text("utf-8")
    for write in (lambda: write_json(path, float("nan")), lambda: canonical_json(float("inf"))):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()
    assert read_json(path) == value and os.listdir(tmp_path) == ["x.json"]
    spelled = '{"a":[1.5,"\\u00e9"],"b":1}'
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == spelled == canonical_json(json.loads(spelled))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_link_replaces_the_old_file_and_a_copy_does_where_there_are_no_links(has_links, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "folder/target"
    source.write_bytes(b"new")
    write_text(target, "old")
    if not has_links:

        def refuse(*arguments, **named):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, target)
    assert target.read_bytes() == b"new" and target.samefile(source) == has_links
    assert os.listdir(target.parent) == ["target"]
