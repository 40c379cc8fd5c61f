"""Sidecars that change after job=manifest are said at the start, and job=manifest reads them again."""

import os

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.layouts.manifest import find_newer
from data.open import load_collection
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


def newer(root):
    return find_newer(root, root / "manifest.parquet")


def test_edited_and_new_sidecars_are_said_and_read_again(root, log):
    assert newer(root) == []
    (root / "sub/a.txt").write_text("new")
    times = (root / "sub/b.txt").stat()
    (root / "sub/b.txt").write_text("odd")  # of the same size, and with its time set back
    os.utime(root / "sub/b.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    (root / "sub/c.json").write_text('{"rating": "e"}')
    (root / "sub/notes.txt").write_text("of no image")
    run(
        "prepare", ["job=filter", "data=image_folder", "data.root=root", "job.apply=true"], root.parent
    )  # writes the manifest again
    assert newer(root) == ["sub/a.txt", "sub/b.txt", "sub/c.json"]
    config = data_config(root=str(root), validation_fraction=0.0)
    assert load_collection(config).row(0).caption == "old"
    assert "3 sidecars are newer than manifest.parquet" in log.text
    write_manifest(root, verify=True)
    rows = map(load_collection(config).row, range(3))
    assert [(row.caption, row.rating) for row in rows] == [("new", None), ("odd", None), ("old", "e")]
    assert newer(root) == []


def test_a_copy_of_a_collection_is_not_newer_and_other_manifests_are_not_asked(root, tmp_path):
    manifest = root / "manifest.parquet"
    os.utime(manifest, ns=(0, 0))  # as a copy with its times looks: its ctime is late
    os.utime(root / "sub/a.txt", ns=(0, 0))
    assert newer(root) == []
    pq.write_table(pq.read_table(manifest).replace_schema_metadata(None), manifest)
    (root / "sub/a.txt").write_text("new")
    assert newer(root) == []
