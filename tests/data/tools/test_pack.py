"""Shards: what is packed is read back as the files are, by WebDataset too; a pack goes on; damage names the shard."""

import itertools
import os
import shutil
import tarfile
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.tools.pack
from data.images.bytes import DAMAGED_SHARD, member_key, open_contents
from data.images.sizes import image_sizes
from data.layouts.table import replace_column
from data.stream.source import UnreadableImage
from tests.data.collection.test_collection import load
from tests.in_process import run
from tests.support import contents, make_collection, pack_collection, refuses, turned, write_manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the files of a collection and with its shards, which are of about 20 KiB."""
    place = tmp_path_factory.mktemp("pack")
    make_collection(place / "files", per_class=6, validation=2)
    shutil.copytree(place / "files/val/B", place / "files/test/B")
    write_manifest(place / "files", verify=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tools.pack.upright_size", lambda content, name: pytest.fail("the manifest states the size"))
        patch.setattr("data.tools.pack._MIB", 2**14)
        pack_collection(load(place / "files", place / "cache"), place / "packed")
    return place


@pytest.fixture
def collections(place):
    return load(place / "files", place / "cache"), load(place / "packed", place / "cache")


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """Return what packs a collection into small shards, and the names of the shards that it wrote."""
    monkeypatch.setattr("data.tools.pack._MIB", 2**14)
    written, write = [], data.tools.pack._write_shard
    note = lambda file, **rest: written.append(file.name.split(".")[1]) or write(file, **rest)  # noqa: E731
    monkeypatch.setattr("data.tools.pack._write_shard", note)

    def pack(collection, output=tmp_path / "packed", shard_mib=1):
        written.clear()
        pack_collection(collection, output, shard_mib)
        return [f"{number}.tar" for number in written]

    return pack


def shards(folder):
    return sorted(folder.glob("*.tar"))


def test_a_packed_collection_is_the_collection(collections, place):
    files, packed = collections
    assert packed.fingerprint == files.fingerprint and packed.is_packed and not files.is_packed
    for name in ("width", "height"):
        assert files.column(name).tolist() == packed.column(name).tolist() and files.column(name).all()
    reader = open_contents(packed)
    for row in range(len(files)):
        assert reader.read(row) == open_contents(files).read(row)
        path, offset, length = reader.file_of(row)
        assert Path(path).read_bytes()[offset : offset + length].endswith(reader.read(row))
    table = packed.table.sort_by([("shard", "ascending"), ("offset", "ascending")])
    splits = set(zip(table["shard"].to_pylist(), table["split"].to_pylist()))
    assert len(splits) == len(shards(place / "packed")) > 3  # each of one split
    labels = [row["label"] for row in table.to_pylist() if row["split"] == "train"]
    assert labels != sorted(labels)  # training rows are mixed


def test_the_index_has_the_sizes_of_upright_images(tmp_path, pack):
    """Of a file that no manifest describes, of one that EXIF turns, and of no image."""
    (tmp_path / "files").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "files/a.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "files/b.jpg", exif=turned())
    (tmp_path / "files/c.png").write_bytes(b"no image")
    files, manifest = load(tmp_path / "files", tmp_path / "cache"), tmp_path / "packed/manifest.parquet"
    sizes = image_sizes(files, np.arange(3), tmp_path / "sizes.json").tolist()
    pack(files)

    def read():
        return image_sizes(load(tmp_path / "packed", tmp_path / "cache"), np.arange(3), tmp_path / "none.json")

    assert read().tolist() == sizes == [[10, 20], [30, 40], [0, 0]]
    pq.write_table(pq.read_table(manifest).drop_columns(["width", "height"]), manifest)
    with refuses(r"^data\.root: .*image sizes.*job=pack"):
        read()


def test_webdataset_reads_the_shards(collections, place):
    webdataset = pytest.importorskip("webdataset")
    _, packed = collections
    rows = {member_key(packed.row(row).path): packed.row(row) for row in range(len(packed))}
    files = [str(file) for file in shards(place / "packed")]
    found = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    assert {sample["__key__"] for sample in found} == rows.keys()
    for sample in found:
        row = rows[sample["__key__"]]
        assert sample["png"].width > 30 and sample["txt"] == row.caption and sample["cls"] == "ABC".index(row.label)
        assert (sample["json"]["path"], tuple(sample["json"]["tags"])) == (row.path, row.tags)


# ------------------------------------------------------------------------------------------------------- going on


def test_a_killed_pack_goes_on(collections, place, tmp_path, pack):
    files, _ = collections
    whole = contents(place / "packed", "*.tar*")
    child = os.fork()
    if child == 0:
        count, add = itertools.count(), tarfile.TarFile.addfile
        tarfile.TarFile.addfile = lambda *a: os.kill(os.getpid(), SIGKILL) if next(count) == 50 else add(*a)
        pack(files, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -SIGKILL
    there = {file.name for file in shards(tmp_path)}
    assert there and list(tmp_path.glob(".*.tmp")) and not (tmp_path / "manifest.parquet").exists()
    assert pack(files, tmp_path) == [name for name in whole if name not in there]
    assert contents(tmp_path, "*.tar*") == whole
    assert load(tmp_path, place / "cache").table.equals(collections[1].table) and not list(tmp_path.glob(".*"))


def test_a_bad_label_is_not_packed_as_none(tmp_path):
    make_collection(tmp_path / "files", per_class=1)
    next((tmp_path / "files").rglob("*.png")).with_suffix(".json").write_text('{"label": [1]}')
    with refuses(r"^data\.on_bad_sidecar: .* label: "):
        run("prepare", ["job=pack", "job.output=packed", "data=image_folder", "data.root=files"], tmp_path)


def test_a_folder_of_something_else_is_refused(collections, tmp_path, pack):
    files, _ = collections
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/000000.tar").write_bytes(b"mine")
    with refuses(r"^job\.output: "):
        pack(files, tmp_path / "mine")
    pack(files)
    with refuses(r"^job\.output: "):
        pack(files, shard_mib=2)


def test_wrong_and_absent_images_and_full_disks_stop_a_pack(tmp_path, pack, monkeypatch):
    make_collection(tmp_path / "root", per_class=2, validation=1)
    write_manifest(tmp_path / "root")
    files = load(tmp_path / "root", tmp_path / "cache")
    image = tmp_path / "root/train/A/000.png"
    before = image.read_bytes()
    image.write_bytes(before[:-1] + b"x")
    with refuses(r"^data\.root: 'train/A/000.png' has the SHA-256 "):
        pack(files)
    image.unlink()
    with refuses(r"^data\.root: .*train/A/000.png"):
        pack(files)
    image.write_bytes(before)

    def fill(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", fill)
        with refuses(r"^job\.output: .*No space left"):
            pack(files)
    assert not (tmp_path / "packed").exists()
    pack(files)


def test_images_of_weight_0_are_left_out_and_shards_are_packed_again(collections, tmp_path, pack):
    _, packed = collections
    weights = np.where(np.arange(len(packed)) == 3, 0, 1).astype(np.float32)
    pq.write_table(replace_column(packed.table, "weight", pa.array(weights)), tmp_path / "manifest.parquet")
    for file in shards(packed.root):
        os.link(file, tmp_path / file.name)
    pack(load(tmp_path, tmp_path / "cache"), tmp_path / "again")
    again = load(tmp_path / "again", tmp_path / "cache")
    assert len(again) == len(packed) - 1
    assert open_contents(again).read(3) == open_contents(packed).read(4)


# --------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def changed(collections, tmp_path):
    """Return what writes the shards with another first row, and loads them."""

    def load_changed(change):
        records = collections[1].table.to_pylist()
        records[0] |= change(records) if callable(change) else change
        for file in shards(collections[1].root):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        pq.write_table(pa.Table.from_pylist(records, collections[1].table.schema), tmp_path / "manifest.parquet")
        return load(tmp_path, tmp_path / "cache")

    return load_changed


def test_damage_is_an_unreadable_image_that_names_the_shard(changed):
    def other(records):
        row = next(row for row in records[1:] if row["shard"] != records[0]["shard"])
        return {name: row[name] for name in ("shard", "offset", "length", "size")}

    def kind(collection):
        with pytest.raises(UnreadableImage) as error:
            open_contents(collection).read(0)
        assert collection.row(0).shard in str(error.value) and collection.row(0).path in str(error.value)
        return error.value.kind

    assert kind(changed(other)) == DAMAGED_SHARD
    assert kind(changed(lambda records: {"offset": records[0]["offset"] + 1})) == DAMAGED_SHARD
    collection = changed({})
    with open(collection.root / collection.row(0).shard, "r+b") as shard:
        shard.seek(collection.row(0).offset + 60)
        shard.write(b"x")  # Pillow would read the image
    assert kind(collection) == DAMAGED_SHARD
    os.truncate(collection.root / collection.row(0).shard, collection.row(0).offset + 100)
    assert kind(collection) == "the file is cut off"
    (collection.root / collection.row(0).shard).unlink()
    assert kind(collection) == "the file cannot be opened"


@pytest.mark.parametrize(
    "change",
    [{"offset": -1}, {"length": None}, {"length": 10**15}, {"shard": None}, {"shard": "../x.tar"}, {"path": "/x"}],
    ids=str,
)
def test_an_index_that_cannot_be_is_refused(change, changed):
    with refuses(r"^data\.root: .*manifest\.parquet"):
        changed(change)
