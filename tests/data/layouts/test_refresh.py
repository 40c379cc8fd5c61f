"""Sidecars that change after job=manifest are said at the start, and data.manifest=refresh reads them again."""

import os
import threading

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.layouts.manifest import save_manifest
from data.layouts.refresh import find_newer
from data.open import load_collection
from tests.in_process import run
from tests.support import data_config, write_manifest
from utils.errors import UserError
from utils.io.journal import open_journal


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
    run("prepare", ["job=split", "data=image_folder", "data.root=root"], root.parent)  # writes the manifest again
    assert newer(root) == ["sub/a.txt", "sub/b.txt", "sub/c.json"]
    config = data_config(root=str(root), validation_fraction=0.0)
    before = load_collection(config)
    assert "3 sidecars are newer than manifest.parquet" in log.text and before.row(0).caption == "old"
    collection = load_collection(config.model_copy(update={"manifest": "refresh"}))
    assert [(row.caption, row.rating) for row in map(collection.row, range(3))] == [
        ("new", None), ("odd", None), ("old", "e"),
    ]  # fmt: skip
    assert newer(root) == [] and collection.row(0).width == 4 and collection.row(0).sha256 == before.row(0).sha256


def test_a_copy_of_a_collection_is_not_newer_and_other_manifests_are_not_asked(root, tmp_path):
    manifest = root / "manifest.parquet"
    os.utime(manifest, ns=(0, 0))  # as a copy with its times looks: its ctime is late
    os.utime(root / "sub/a.txt", ns=(0, 0))
    assert newer(root) == []
    pq.write_table(pq.read_table(manifest).replace_schema_metadata(None), manifest)
    (root / "sub/a.txt").write_text("new")
    assert newer(root) == []
    with pytest.raises(UserError, match=r"manifest\.parquet' was not written by job=manifest"):
        load_collection(data_config(root=str(root), manifest="refresh"))
    manifest.unlink()
    with pytest.raises(UserError, match=r"^data\.manifest: refresh"):
        load_collection(data_config(root=str(root), manifest="refresh"))


def test_a_refresh_waits_for_a_job_that_writes_the_manifest_and_loses_none_of_its_changes(root, monkeypatch):
    refresh = data_config(root=str(root), validation_fraction=0.0, manifest="refresh")
    (root / "sub/a.txt").write_text("new")
    with open_journal("data.root", root / "manifest.parquet"):
        table = pq.read_table(root / "manifest.parquet")
        together = [threading.Thread(target=load_collection, args=[refresh]) for _ in range(2)]
        for thread in together:
            thread.start()
        number = table.column_names.index("split")
        save_manifest(root, table.set_column(number, "split", [["val", "train", "train"]]))
        assert all(thread.is_alive() for thread in together)
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^data.root: another command is writing"):
            patch.setattr("data.layouts.refresh._PATIENCE_SEC", 0)
            load_collection(refresh)
    for thread in together:
        thread.join()
    found = pq.read_table(root / "manifest.parquet")
    assert found["split"].to_pylist() == ["val", "train", "train"] and found["caption"].to_pylist()[0] == "new"
    assert [file.name for file in root.iterdir() if file.is_file()] == ["manifest.parquet"] and newer(root) == []
