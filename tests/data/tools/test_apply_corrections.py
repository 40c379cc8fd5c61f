"""Corrections become sidecars, of any kind that an image has, and the sidecars are taken back."""

import json

import pytest

from data.layouts.corrections import append_corrections
from data.layouts.names import UNDO
from data.tools import apply_corrections
from data.tools.apply_corrections import _restore
from data.tools.config import ApplyCorrections
from tests.data.collection.test_collection import columns, opened, put, root  # noqa: F401
from tests.data.layouts.test_corrections import decide
from tests.support import contents, data_config, refuses
from utils.io.files import read_json

HAD = ("path", "label", "tags")


def apply(root, undo=False):  # noqa: F811
    return ApplyCorrections(name="apply_corrections", undo=undo).run(data_config(root=str(root)))


def test_labels_and_tags_go_to_sidecars_and_back(root, opened, caplog):  # noqa: F811
    put(root, "cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png", "cat/4.jpg", "dog/1.png")
    (root / "cat/1.txt").write_bytes(b"1girl, hat\r\n")
    (root / "cat/2.json").write_text('{"tag_string": "hat sky", "score": 3}')
    (root / "cat/3.txt").write_text("")
    (root / "cat/4.txt").write_text("hat")
    (root / "dog/1.caption").write_text("A dog sits there.\nhat, dog")
    append_corrections(root, [
        decide("cat/1.png", "cat", "dog"), decide("cat/1.png", ["1girl", "hat"], ["1girl", "red hair"]),
        decide("cat/2.png", ["hat", "sky"], ["sky"]), decide("cat/3.png", [], ["é\\, ü"]),
        decide("cat/4.png", ["hat"], ["sky"]), decide("dog/1.png", "fox", "cat"),
        decide("dog/1.png", ["hat", "dog"], ["dog", "big"]), decide("cat/4.png", 1.0, 0.0, field="weight"),
    ])  # fmt: skip
    before, wanted = contents(root), columns(opened(root), *HAD)
    assert apply(root).startswith("the corrections of 5 images")
    assert "changed since: dog/1.png" in caplog.text and "keeps them: cat/4.png" in caplog.text
    assert columns(opened(root), *HAD) == wanted
    assert (root / "cat/1.txt").read_text() == "1girl, red hair\n" and (root / "cat/4.txt").read_text() == "hat"
    assert read_json(root / "cat/2.json") == {"tag_string": "hat sky", "score": 3, "tags": ["sky"]}
    assert apply(root).startswith("the corrections of 0 images")
    (root / "cat/2.json").write_text("{}")
    apply(root, undo=True)
    assert "1 sidecars were edited since and stay: cat/2.json" in caplog.text
    assert contents(root) == {**before, "cat/2.json": b"{}"}
    assert apply(root, undo=True).startswith("0 sidecars")


KINDS = {
    "cat/bare": {},
    "cat/both": {".caption": "A cat sits there.\na, b", ".txt": "a, b"},
    "cat/lines": {".txt": "a\nb", ".json": '{"tags": "a b"}'},
    "dog/said": {".txt": "A dog sits there."},
    "dog/box": {".json": '{"version": "5.0"}'},
    "dog/list": {".json": "[]"},
}


def test_a_killed_job_goes_on_where_it_was(tmp_path, monkeypatch, caplog):
    """Labels and tags change, with every kind of sidecar; one has a list, into which no label fits."""

    def make(name):
        for stem, files in KINDS.items():
            put(tmp_path / name, f"{stem}.png")
            for suffix, text in files.items():
                (tmp_path / name / f"{stem}{suffix}").write_text(text)
            had = ["a", "b"] if len(files) == 2 else []
            lines = [decide(f"{stem}.png", had, [*had[:1], "c"]), decide(f"{stem}.png", stem[:3], "owl")]
            append_corrections(tmp_path / name, lines)
        (tmp_path / name / "cat/both.txt").chmod(0o640)
        return tmp_path / name

    def killed(path, text, write=apply_corrections.write_text):
        written.append(path)
        if len(written) == most:
            path.with_name(f".{path.name}.7.tmp").write_text(text[:1])
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(apply_corrections, "write_text", killed)
    written, most = [], 0
    whole = make("whole")
    before = contents(whole)
    assert apply(whole).startswith("the corrections of 5 images") and "dog/list.png (its .json" in caplog.text
    wanted, total = contents(whole), len(written)
    for most in range(1, total + 1):
        written.clear()
        root = make(str(most))  # noqa: F811
        with pytest.raises(KeyboardInterrupt):
            apply(root)
        apply(root)
        assert contents(root) | {UNDO: b""} == wanted | {UNDO: b""}
        assert apply(root, undo=True).startswith(f"{total} sidecars are") and contents(root) == before
        assert (root / "cat/both.txt").stat().st_mode & 0o777 == 0o640


def test_where_sidecars_do_not_count(root, tmp_path):  # noqa: F811
    put(root, "1.png")
    (root / UNDO).write_text(json.dumps({"file": "../x", "before": "a", "after": ""}) + "\n")
    with refuses(r"^data\.root: .*leads out of the collection"):
        _restore(root)
    (root / "manifest.csv").write_text("path,label\n1.png,cat\n")
    with refuses(r"^data\.root: .*manifest\.csv"):
        apply(root)
    assert not (tmp_path / "x").exists()
