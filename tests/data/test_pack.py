"""Shards: what is packed is read back as the files are, by WebDataset too; a pack goes on; damage names the shard."""

import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.buckets import image_sizes
from data.collection import index_collection, open_collection
from data.image_formats import UnreadableImage
from data.images import Files, open_contents
from data.manifest_writer import write_manifest
from data.open import describe_transparency
from data.pack import _Packer, pack_collection
from data.shards import ShardContents, member_key
from data.stream import build_sampler
from data.table import replace_column
from tests.in_process import run
from tests.support import SCRIPTS, TINY, assert_same_rows, common, make_collection
from tests.support import run as start
from utils.config.messages import ConfigError
from utils.errors import UserError


def load(root, cache, fraction=0.0):
    return open_collection(str(root), index_collection(str(root), validation_fraction=fraction, cache=cache))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the files of a collection and with its shards, which are of about 20 KiB."""
    place = tmp_path_factory.mktemp("pack")
    make_collection(place / "files", per_class=6, validation=2)
    write_manifest(str(place / "files"), validation_fraction=0.0, verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.pack._MIB", 2**14)
        pack_collection(load(place / "files", place / "cache"), place / "packed", 1, lambda done, total: None)
    return place


@pytest.fixture
def collections(place):
    return load(place / "files", place / "cache"), load(place / "packed", place / "cache")


@pytest.fixture
def pack(monkeypatch):
    """Return what packs a collection into small shards, and the number of shards that it wrote."""
    monkeypatch.setattr("data.pack._MIB", 2**14)
    written, write = [], _Packer.write
    monkeypatch.setattr(_Packer, "write", lambda self, file, rows: written.append(file.name) or write(self, file, rows))

    def pack(collection, output, shard_mib=1):
        written.clear()
        report = pack_collection(collection, output, shard_mib, lambda done, total: None)
        assert report.shards == report.kept + len(written)
        return written

    return pack


def shards(folder):
    return sorted(folder.glob("*.tar"))


def test_a_packed_collection_is_the_collection(collections):
    files, packed = collections
    assert packed.fingerprint == files.fingerprint
    assert [packed.row(row) for row in range(len(packed))] == [files.row(row) for row in range(len(files))]
    contents = pickle.loads(pickle.dumps(open_contents(packed)))
    assert isinstance(contents, ShardContents)
    for row in range(len(files)):
        assert contents.read(row) == Files(files).read(row)
        path, offset, length = contents.file_of(row)
        assert Path(path).read_bytes()[offset : offset + length].endswith(contents.read(row))


def test_shards_have_one_split_and_training_rows_are_mixed(collections, place):
    _, packed = collections
    table = packed.table.sort_by([("shard", "ascending"), ("offset", "ascending")])
    assert len(shards(place / "packed")) > 3
    assert all(len(set(table.filter(pa.compute.equal(table["shard"], name.name))["split"].to_pylist())) == 1
               for name in shards(place / "packed"))  # fmt: skip
    labels = [row["label"] for row in table.to_pylist() if row["split"] == "train"]
    assert labels != sorted(labels)


def test_the_index_has_the_sizes_of_upright_images(tmp_path, pack):
    """Of a file that no manifest describes, of one that EXIF turns, of no image, and again of shards that are there."""
    (tmp_path / "files").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "files/a.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "files/b.jpg", exif=exif)
    (tmp_path / "files/c.png").write_bytes(b"no image")
    files, manifest = load(tmp_path / "files", tmp_path / "cache"), tmp_path / "packed/manifest.parquet"
    sizes = image_sizes(files, np.arange(3), tmp_path / "sizes.json").tolist()
    for _ in range(2):
        pack(files, tmp_path / "packed")
        packed = load(tmp_path / "packed", tmp_path / "cache")
        assert (
            image_sizes(packed, np.arange(3), tmp_path / "none.json").tolist() == sizes == [[10, 20], [30, 40], [0, 0]]
        )
        pq.write_table(pq.read_table(manifest).drop_columns(["width", "height"]), manifest)
    with pytest.raises(UserError, match=r"^data\.root: .*image sizes.*job=pack"):
        image_sizes(load(tmp_path / "packed", tmp_path / "cache"), np.arange(3), tmp_path / "none.json")


def test_sizes_that_a_manifest_states_are_kept(tmp_path, pack):
    make_collection(tmp_path / "files", per_class=2, validation=1)
    write_manifest(str(tmp_path / "files"), validation_fraction=0.0, verify=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.pack.upright_size", lambda content, name: pytest.fail("read again"))
        pack(load(tmp_path / "files", tmp_path / "cache"), tmp_path / "packed")
    stated = [load(tmp_path / name, tmp_path / "cache").stated_sizes().tolist() for name in ("files", "packed")]
    assert stated[0] == stated[1] and stated[0][0][0] > 0


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


def test_blocks_follow_the_shards(collections):
    _, packed = collections
    sampler = build_sampler("blocks", packed.rows("train"), packed, 0)
    places = [(packed.view(row).shard, packed.view(row).offset) for row in sampler.rows.tolist()]
    assert places == sorted(places) and sorted(sampler.rows) == packed.rows("train").tolist()


# ------------------------------------------------------------------------------------------------------- going on


def test_a_pack_goes_on_and_writes_damaged_shards_again(collections, place, tmp_path, pack):
    files, _ = collections
    first = pack(files, tmp_path)
    assert first == [file.name for file in shards(place / "packed")]
    contents = {file.name: file.read_bytes() for file in shards(tmp_path)}
    assert contents == {file.name: file.read_bytes() for file in shards(place / "packed")}
    cut, changed, gone = shards(tmp_path)[:3]
    os.truncate(cut, 3000)
    with open(changed, "r+b") as stream:
        stream.seek(530)
        stream.write(b"x")
    gone.unlink()
    (tmp_path / ".000002.tar.77.tmp").write_bytes(b"what a killed pack left")
    assert pack(files, tmp_path) == [cut.name, changed.name, gone.name]
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.tar*")} == contents
    assert pack(files, tmp_path) == [] and not list(tmp_path.glob(".*"))


def test_a_killed_pack_goes_on(collections, place, tmp_path, pack):
    files, _ = collections
    child = os.fork()
    if child == 0:
        count, add = itertools.count(), tarfile.TarFile.addfile
        tarfile.TarFile.addfile = lambda *a: os.kill(os.getpid(), SIGKILL) if next(count) == 50 else add(*a)
        pack(files, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -SIGKILL
    there = {file.name for file in shards(tmp_path)}
    assert there and list(tmp_path.glob(".*.tmp")) and not (tmp_path / "manifest.parquet").exists()
    assert pack(files, tmp_path) == [file.name for file in shards(place / "packed") if file.name not in there]
    assert [file.read_bytes() for file in shards(tmp_path)] == [file.read_bytes() for file in shards(place / "packed")]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_refused(collections, tmp_path, pack):
    files, _ = collections
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"^job\.output: "):
        pack(files, tmp_path / "mine")
    pack(files, tmp_path / "packed")
    with pytest.raises(UserError, match=r"^job\.output: "):
        pack(files, tmp_path / "packed", shard_mib=2)


def test_wrong_and_absent_images_and_full_disks_stop_a_pack(place, tmp_path, pack, monkeypatch):
    make_collection(tmp_path / "root", per_class=2, validation=1)
    write_manifest(str(tmp_path / "root"), validation_fraction=0.0, verify=False)
    files = load(tmp_path / "root", tmp_path / "cache")
    image = tmp_path / "root/train/A/000.png"
    before = image.read_bytes()
    image.write_bytes(before[:-1] + b"x")
    with pytest.raises(UserError, match=r"^data\.root: 'train/A/000.png' has the SHA-256 "):
        pack(files, tmp_path / "packed")
    image.unlink()
    with pytest.raises(UserError, match=r"^data\.root: .*train/A/000.png"):
        pack(files, tmp_path / "packed")
    image.write_bytes(before)

    def fill(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", fill)
        with pytest.raises(UserError, match=r"^job\.output: .*No space left"):
            pack(files, tmp_path / "packed")
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == ["pack.json"]
    pack(files, tmp_path / "packed")


def test_images_of_weight_0_are_left_out_and_shards_are_packed_again(collections, tmp_path, pack):
    _, packed = collections
    weights = np.where(np.arange(len(packed)) == 3, 0, 1).astype(np.float32)
    table = replace_column(packed.table, "weight", pa.array(weights))
    pq.write_table(table, tmp_path / "manifest.parquet")
    for file in shards(packed.root):
        os.link(file, tmp_path / file.name)
    pack(load(tmp_path, tmp_path / "cache"), tmp_path / "again")
    again = load(tmp_path / "again", tmp_path / "cache")
    assert len(again) == len(packed) - 1
    assert open_contents(again).read(3) == open_contents(packed).read(4)


# --------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def spoilt(collections, tmp_path):
    """Return what changes the manifest or the shard of the first row and reads that row."""
    _, packed = collections

    def read(change=None, spoil=None):
        records = packed.table.to_pylist()
        records[0] |= change(records) if change else {}
        for file in shards(packed.root):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        pq.write_table(pa.Table.from_pylist(records, packed.table.schema), tmp_path / "manifest.parquet")
        changed = load(tmp_path, tmp_path / "cache")
        if spoil:
            spoil(tmp_path / records[0]["shard"], records[0]["offset"])
        with pytest.raises(UnreadableImage) as error:
            open_contents(changed).read(0)
        assert records[0]["shard"] in str(error.value) and records[0]["path"] in str(error.value)
        return error.value.kind

    return read


def test_damage_is_an_unreadable_image_that_names_the_shard(spoilt):
    def other(records):
        row = next(row for row in records[1:] if row["shard"] != records[0]["shard"])
        return {name: row[name] for name in ("shard", "offset", "length", "size")}

    wrong = "the shard holds something else there"
    assert spoilt(other) == wrong
    assert spoilt(lambda records: {"offset": records[0]["offset"] + 1}) == wrong
    assert spoilt(lambda records: {"offset": 0}) == "the file is cut off"
    assert spoilt(lambda records: {"length": records[0]["length"] - 1}) == wrong
    assert spoilt(lambda records: {"length": 10**15}) == "the file is cut off"
    assert spoilt(lambda records: {"offset": 10**15}) == "the file is cut off"
    assert spoilt(spoil=lambda shard, offset: os.truncate(shard, offset + 100)) == "the file is cut off"
    assert spoilt(spoil=lambda shard, offset: shard.unlink()) == "the file cannot be opened"


@pytest.mark.parametrize(
    "change",
    [{"offset": -1}, {"length": None}, {"shard": None}, {"shard": "../x.tar"}, {"shard": "absent.tar"}, {"path": "/x"}],
    ids=str,
)
def test_an_index_that_cannot_be_is_refused(change, collections, place, tmp_path):
    records = collections[1].table.to_pylist()
    records[2] |= change
    for file in shards(place / "packed"):
        os.link(file, tmp_path / file.name)
    pq.write_table(pa.Table.from_pylist(records, collections[1].table.schema), tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match=r"^data\.root: .*manifest\.parquet"):
        load(tmp_path, tmp_path / "cache")


def test_the_command(place, tmp_path):
    overrides = ["job=pack", "data=image_folder", f"data.root={place / 'files'}", "job.output=packed"]
    for _ in range(2):
        assert run("prepare", overrides, tmp_path) == "24 images in 2 shards"
    assert json.loads((tmp_path / "packed/pack.json").read_text())["shard_mib"] == 256
    with pytest.raises(ConfigError, match=r"job\.output: must be given"):
        run("prepare", overrides[:3], tmp_path)


def test_training_on_shards_equals_training_on_files(place, tmp_path):
    """The same seed gives the same samples, so figures are equal."""
    more = ["loop.total_steps=3", "loop.global_batch_size=8", "loop.batch_size=8", "runtime.workers=0"]
    for name in ("files", "packed"):
        start(SCRIPTS["classification"], common("classification", place / name, tmp_path / name, *more), tmp_path)
    assert_same_rows(tmp_path / "files", tmp_path / "packed", tolerance=0)


@pytest.mark.slow
def test_sdxl_on_shards_has_the_latents_and_figures_of_files(place, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    own = [*TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=2"]
    own += ["loop.global_batch_size=8", "loop.batch_size=4", "loop.log_every_steps=1", "task.latent_cache=latents"]
    for name in ("packed", "files"):  # the second finds all latents
        run("finetune_sdxl", [*own, f"data.root={place / name}", f"run_dir={name}"], tmp_path)
        monkeypatch.setattr("engine.tasks.diffusion_kind.encode_images", lambda *_: pytest.fail("encoded again"))
    assert_same_rows(tmp_path / "files", tmp_path / "packed", tolerance=0)


def test_alpha_in_shards_is_counted_as_the_manifest_states_it(tmp_path, pack):
    make_collection(tmp_path / "files", per_class=6, validation=2)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "files/train/A/clear.png")
    write_manifest(str(tmp_path / "files"), validation_fraction=0.0, verify=True)
    pack(load(tmp_path / "files", tmp_path / "cache"), tmp_path / "packed")
    packed = load(tmp_path / "packed", tmp_path / "cache")
    count = len(packed.rows("train"))
    assert describe_transparency(packed, "white").startswith(f"; 1 of {count} have an alpha channel, put on white")
