"""Sidecars that change after job=manifest are said at the start, and job=manifest reads them again."""

import os
import shutil

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.layouts.manifest import find_changed
from data.load import load_collection
from tests.data.collection.test_collection import columns
from tests.in_process import run
from tests.support import data_config, write_manifest


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root/sub").mkdir(parents=True)
    for name in "abc":
        Image.new("L", (4, 4)).save(tmp_path / f"root/sub/{name}.png")
        (tmp_path / f"root/sub/{name}.txt").write_text("old")
    write_manifest(tmp_path / "root", verify=True)
    return tmp_path / "root"


def changed(root):
    return find_changed(root, root / "manifest.parquet")


def test_edited_new_and_deleted_sidecars_are_said_and_read_again(root, log):
    assert changed(root) == []
    (root / "sub/a.txt").write_text("new")
    os.utime(root / "sub/a.txt", (0, 0))  # no clock is asked
    (root / "sub/b.txt").unlink()
    (root / "sub/c.json").write_text('{"rating": "e"}')
    (root / "sub/notes.txt").write_text("of no image")
    (root / "metadata.jsonl").write_text("")
    words = ["job=filter", "data=image_folder", "data.root=root", "job.apply=true"]
    run("prepare", words, root.parent)  # writes the manifest again
    assert changed(root) == ["metadata.jsonl", "sub/a.png", "sub/b.png", "sub/c.png"]
    (root / "metadata.jsonl").unlink()
    config = data_config(root=str(root), validation_fraction=0.0)
    assert load_collection(config).row(0).caption == "old"
    assert "sidecars of 3 images, or tables, differ from what manifest.parquet has read" in log.text
    write_manifest(root, verify=True)
    found = columns(load_collection(config), "caption", "rating")
    assert found == [("new", None), (None, None), ("old", "e")]
    assert changed(root) == []


def test_sidecars_dated_ahead_copies_and_manifests_of_others_are_as_they_were(root, tmp_path):
    os.utime(root / "sub/a.txt", (4e9, 4e9))  # a camera or a NAS with a wrong clock
    write_manifest(root)
    run("prepare", ["job=copy", "data=image_folder", "data.root=root", "job.to=copy"], tmp_path)
    shutil.copytree(root, tmp_path / "other")
    assert changed(root) == changed(tmp_path / "copy") == changed(tmp_path / "other") == []
    shutil.copytree(root, tmp_path / "later", copy_function=shutil.copyfile)  # with the times of the copy
    assert changed(tmp_path / "later") == []
    (tmp_path / "later/sub/a.txt").write_text("longer")
    assert changed(tmp_path / "later") == ["sub/a.png"]
    manifest = root / "manifest.parquet"
    pq.write_table(pq.read_table(manifest).replace_schema_metadata(None), manifest)
    (root / "sub/a.txt").write_text("new")
    assert changed(root) == []
