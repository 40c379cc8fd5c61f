"""The cache on disk: hits equal misses, nothing stale or damaged is served, and no kill or full disk matters."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from data.cache import disk, store
from data.cache.disk import DiskCached
from data.cache.store import COUNTED, close_stores, open_store
from data.decode import Decoder
from data.image_formats import UnreadableImage
from data.images import Files, Images
from data.loader import EvaluationStream, Loader, SampleReader, no_fields
from data.source import IMAGE, Counters, not_cached
from data.stream import Policy
from tests.data.test_loader import open_folder
from tests.in_process import TINY, make_images, run
from tests.support import cache_config
from tests.support import rows as logged
from utils.config.recipe import is_free
from utils.errors import UserError

COUNT, RGB = 12, Decoder(3, 10**6)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Take files that were just written for old ones; close what a test has opened."""
    monkeypatch.setattr(disk, "_YOUNG_SEC", 0)
    yield
    close_stores()


def write_noise(file, seed):
    """Write a BMP, whose size does not depend on its pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40 + seed % 7, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def photos(tmp_path):
    for number in range(COUNT):
        write_noise(tmp_path / "photos" / "train" / "a" / f"{number:02}.bmp", number)
    return open_folder(tmp_path / "photos", tmp_path / "index")


def cached(photos, folder, decoder=RGB, **changes):
    config = cache_config(folder=str(folder), **{"disk_gib": 0.05} | changes)
    return DiskCached(Images(Files(photos), decoder), config)


def read_all(source):
    return [source.read(row)[IMAGE] for row in range(COUNT)]


def counted(source):
    counts = source.counts.totals()
    return counts["hits"], counts["misses"]


def assert_equal(first, second):
    assert all(map(torch.equal, first, second))


def limited(folder, mib):
    return open_store(folder, mib << 20, Counters(*COUNTED))


# ---------------------------------------------------------------------------------------------------- the same pixels


@pytest.mark.parametrize("form, channels", [("raw", 3), ("jpeg", 1), ("webp", 3)])
def test_a_hit_equals_a_miss(form, channels, photos, tmp_path):
    source = cached(photos, tmp_path / "cache", Decoder(channels, 10**6), format=form)
    missed = read_all(source)
    close_stores()
    hit = read_all(source)
    assert counted(source) == (COUNT, COUNT)
    assert_equal(hit, missed)
    for image, plain in zip(hit, read_all(source.inner)):
        assert image.shape == plain.shape and (channels == 1 or image.stride() == plain.stride())
        assert torch.equal(image, plain) == (form == "raw")
        image.zero_()  # memory of its own
    assert_equal(read_all(source), missed)


def test_what_pixels_depend_on_is_in_the_key(photos, tmp_path):
    read_all(cached(photos, tmp_path / "cache"))
    close_stores()
    others = [
        cached(photos, tmp_path / "cache", Decoder(3, 10**6, shortest_px=20)),
        cached(photos, tmp_path / "cache", Decoder(1, 10**6)),
        cached(photos, tmp_path / "cache", Decoder(3, 10**5)),
        cached(photos, tmp_path / "cache", Decoder(3, 10**6, "black")),
        cached(photos, tmp_path / "cache", format="jpeg"),
        cached(photos, tmp_path / "cache", format="jpeg", quality=50),
    ]
    for other in others:
        missed = read_all(other)
        close_stores()
        assert counted(other) == (0, COUNT)
        assert_equal(read_all(other), missed)
    assert min(others[0].read(0)[IMAGE].shape[1:]) == 20


def test_an_edited_file_is_read_again_and_a_copied_one_is_not_decoded(photos, tmp_path, monkeypatch):
    source = cached(photos, tmp_path / "cache")
    before = read_all(source)
    close_stores()
    file, times = photos.absolute_path(0), os.stat(photos.absolute_path(0))
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_size == times.st_size and os.stat(file).st_mtime_ns == times.st_mtime_ns
    assert torch.equal(source.read(0)[IMAGE], 255 - before[0])
    file.unlink()
    with pytest.raises(UnreadableImage):
        source.read(0)
    shutil.copy(photos.absolute_path(1), file)
    monkeypatch.setattr(Decoder, "__call__", None)
    assert torch.equal(source.read(0)[IMAGE], before[1])


def test_a_file_of_this_moment_may_change_within_a_tick_of_the_clock(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_YOUNG_SEC", 3600)
    source = cached(photos, tmp_path / "cache")
    read_all(source)
    close_stores()
    assert not any(map(source.has, range(COUNT)))
    monkeypatch.setattr(Decoder, "__call__", None)
    read_all(source)  # by content


def test_loader_workers_fill_it_and_files_in_it_are_not_read_ahead(photos, tmp_path):
    source = cached(photos, tmp_path / "cache")
    machine = type("Machine", (), {"workers": 2, "prefetch_batches": 2, "device": torch.device("cpu")})
    views = {"images": lambda image, draw: image[:, :30, :40].float()}

    def epoch():
        reader = SampleReader(photos, source, views, no_fields, training=False)
        batches = EvaluationStream(Loader(reader, machine, print), range(COUNT), Policy(0, 4, 4))
        return torch.cat([batch["images"] for batch in batches])

    assert not_cached(source, range(COUNT)) == list(range(COUNT))  # which opens the store in this process
    first = epoch()
    assert not_cached(source, range(COUNT)) == []
    assert torch.equal(epoch(), first) and counted(source) == (COUNT, COUNT)
    readings = source.readings()
    assert readings.pop("l2_hit_rate") == 0.5 and readings.pop("l2_gib") > 0 and set(readings.values()) == {0}


# ---------------------------------------------------------------------------------------------------------- the store


def test_a_damaged_record_is_decoded_anew_and_replaced(photos, tmp_path):
    source = cached(photos, tmp_path / "cache")
    before = read_all(source)
    close_stores()
    with lmdb.open(str(tmp_path / "cache/images.lmdb"), map_size=1 << 26) as opened, opened.begin(write=True) as txn:
        for name, record in list(txn.cursor().iternext()):
            if len(record) > 1000:
                txn.put(name, record[:500] + bytes([record[500] ^ 1]) + record[501:])
        txn.put(b"f" * 32, b"")
    assert_equal(read_all(source), before)
    close_stores()
    assert_equal(read_all(source), before)
    assert counted(source) == (COUNT, 3 * COUNT - COUNT)


def test_the_oldest_records_make_room(tmp_path):
    kept, random = limited(tmp_path, 4), np.random.default_rng(0)
    contents = {f"{number:04x}": random.bytes(int(random.integers(10, 90_000))) for number in range(140)}
    for name, content in contents.items():
        kept.put(name, content, wait=True)
    close_stores()
    assert (tmp_path / "images.lmdb/data.mdb").stat().st_size <= 4 << 20
    kept = limited(tmp_path, 4)
    found = [name for name in contents if kept.has(name)]
    assert all(kept.get(name).tobytes() == contents[name] for name in found)
    assert sum(len(contents[name]) for name in found) > 2 << 20 and found == list(contents)[-len(found) :]


HOLD = """
import lmdb, sys
with lmdb.open(sys.argv[1], map_size=1 << 26) as opened, opened.begin(write=True) as txn:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_readers_wait_for_no_writer(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_WAITING_BYTES", 10_000)
    source = cached(photos, tmp_path / "cache")
    file = str(tmp_path / "cache/images.lmdb")
    with subprocess.Popen([sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert_equal(read_all(source), read_all(source.inner))
        assert source.readings()["l2_dropped"] > 0
        other.stdin.close()
    close_stores()
    assert source.has(0)


def content_of(name):
    return np.random.default_rng(int(name, 16)).bytes(20_000)


def write_for_ever(folder, first, committed):
    """Write eight records at a time, and tell of them when they are committed."""
    kept = limited(folder, 1024)
    for number in itertools.count(first, 8):
        batch = [f"{name:08x}" for name in range(number, number + 8)]
        kept._write([(name.encode(), store._wrap(name.encode(), content_of(name))) for name in batch])
        committed.send(batch)


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path):
    """Each is killed at another moment. The file has room for all."""
    fork, names = multiprocessing.get_context("fork"), []
    for number in range(5):
        told, teller = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_for_ever, args=(tmp_path, number << 12, teller))
        writer.start()
        teller.close()
        names += told.recv()
        time.sleep(0.003 * (number % 17))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                names += told.recv()
    kept = limited(tmp_path, 1024)
    assert len(names) >= 8 * 5
    assert all(kept.get(name).tobytes() == content_of(name) for name in names)
    with kept._env.begin() as transaction:
        records = [name for name, _ in transaction.cursor() if len(name) == 8 and name >= b"0"]
    assert all(kept.get(name.decode()).tobytes() == content_of(name) for name in records)
    kept.put("ff", b"still written")
    close_stores()
    assert limited(tmp_path, 1024).has("ff")


def test_a_full_disk_is_one_warning(photos, small_disk, log):
    shutil.copytree(photos.root, small_disk / "more")  # half of the disk
    source = cached(photos, small_disk / "cache")
    for channels in (3, 1):
        for shortest in range(10, 30):
            source.inner.decoder = Decoder(channels, 10**6, shortest_px=shortest)
            source._recipe = str((channels, shortest))
            assert_equal(read_all(source), read_all(source.inner))
            close_stores()  # which writes what is waiting: a quick reader would have it dropped
    read_all(source)
    warned = [record for record in log.records if record.getMessage().startswith("data.cache.folder")]
    assert len(warned) == 1 and source.counts.totals()["refused"] > 0


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_file_is_set_aside(damage, photos, tmp_path, log):
    before = read_all(cached(photos, tmp_path / "cache"))
    close_stores()
    file = tmp_path / "cache/images.lmdb/data.mdb"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        with open(file, "r+b") as stream:
            stream.write(b"\xff" * 8192)
    source = cached(photos, tmp_path / "cache")
    assert "images.lmdb.damaged-0" in log.text
    assert_equal(read_all(source), before)
    assert counted(source) == (0, COUNT)


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_folder_that_cannot_be_used_is_refused(photos, tmp_path, monkeypatch):
    cached(photos, tmp_path / "newer")
    close_stores()
    with open(tmp_path / "newer/images.lmdb/data.mdb", "r+b") as stream:
        for page in (0, 4096):  # whose headers have 16 bytes; the magic number of 4, and the version follow
            stream.seek(page + 20)
            stream.write(b"\xff" * 4)
    with pytest.raises(UserError, match=r"^data.cache.folder: .*format.*remove it"):
        cached(photos, tmp_path / "newer")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^data.cache.folder: .*data.cache.disk_gib=0"):
        cached(photos, tmp_path / "file" / "cache")
    monkeypatch.setattr(store, "network_file_system", lambda path: "nfs4")
    with pytest.raises(UserError, match=r"^data.cache.folder: .*nfs4"):
        cached(photos, tmp_path / "cache")


def send_refusal(folder, answers):
    """Open a folder as a user who owns nothing; others than root need no change for what is read-only."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError) as refused:
        limited(folder, 50)
    answers.send(str(refused.value))


def test_a_cache_of_another_user_is_refused():
    with tempfile.TemporaryDirectory() as above:  # others may not enter the folders of pytest
        os.chmod(above, 0o755)
        folder, fork = Path(above) / "cache", multiprocessing.get_context("fork")
        limited(folder, 50)
        close_stores()
        for file in (*folder.rglob("*.mdb"), folder / "opening"):
            file.chmod(0o444)
        answer, answers = fork.Pipe(duplex=False)
        child = fork.Process(target=send_refusal, args=(folder, answers))
        child.start()
        child.join(60)
        assert answer.poll()
        message = answer.recv()
    assert message.startswith(f"data.cache.folder: {folder}") and "chmod" in message and "remove" not in message
    assert "data.cache.disk_gib=0" in message


def test_a_lossy_form_is_part_of_the_recipe_and_needs_the_cache():
    with pytest.raises(ValueError, match="data.cache.format"):
        cache_config(folder="x", disk_gib=0.0, format="jpeg")
    assert is_free("data.cache.disk_gib") and is_free("data.cache.folder") and not is_free("data.cache.format")


def test_a_run_is_the_same_with_a_cache_that_prepare_has_filled(tmp_path, monkeypatch):
    root = f"data.root={make_images(tmp_path / 'images')}"
    cache = ["data.cache.disk_gib=0.05", "data.cache.folder=cache"]
    warm = ["job=warm_cache", "data=image_folder", root]
    monkeypatch.setattr("utils.ranks.processes.PARALLEL_FROM", 0)
    with pytest.raises(UserError, match=r"^data.cache.disk_gib"):
        run("prepare", warm, tmp_path)
    assert run("prepare", [*warm, *cache, "dry_run=true"], tmp_path).startswith("dry run: 12 of 12 images")
    assert run("prepare", [*warm, *cache], tmp_path) == "12 images added, 0 were there, 0 unreadable"
    assert run("prepare", [*warm, *cache], tmp_path) == "0 images added, 12 were there, 0 unreadable"
    assert run("prepare", [*warm, *cache, "dry_run=true"], tmp_path).startswith("dry run: 0 of 12 images")
    run("finetune", [*TINY, root, "run_dir=plain"], tmp_path)
    close_stores()
    monkeypatch.setattr(Decoder, "__call__", None)
    run("finetune", [*TINY, root, *cache, "run_dir=cached"], tmp_path)
    losses = [
        [row["loss"] for row in logged(tmp_path / name / "metrics.jsonl", "train")] for name in ("plain", "cached")
    ]
    assert losses[0] == losses[1]
