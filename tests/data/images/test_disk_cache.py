"""The cache on disk: hits equal misses, nothing stale is served, and no full disk matters."""

import functools
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.bytes import Images
from data.images.decode import Decoder
from data.images.disk_cache import image_key, keep_on_disk
from data.stream.loader import EvaluationStream, Loader, no_fields
from data.stream.source import IMAGE, UnreadableImage
from tests.data.collection.test_collection import load
from tests.support import cache_config, placed, refuses
from utils.contracts import LoaderMachine

COUNT, RGB = 12, Decoder(3, 10**6)


def write_noise(file, seed):
    """Write a BMP, whose size does not depend on its pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40 + seed % 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(placed(file))


@pytest.fixture
def photos(tmp_path):
    for number in range(COUNT):
        write_noise(tmp_path / "photos" / "train" / "a" / f"{number:02}.bmp", number)
    return load(tmp_path / "photos", tmp_path / "index")


def cached(photos, folder, decoder=RGB, **changes):
    config = cache_config(folder=str(folder), **{"disk_gib": 0.05} | changes)
    return keep_on_disk(Images(photos, decoder), config)


def read_all(source):
    return [source.read(row)[IMAGE] for row in range(COUNT)]


def counted(source):
    counts = source.counts()
    return counts["hits"], counts["misses"]


def assert_equal(first, second):
    assert all(map(torch.equal, first, second))


def test_an_edited_file_is_read_again(photos, tmp_path):
    source = cached(photos, tmp_path / "cache")
    before = read_all(source)
    file, times = photos.absolute_path(0), os.stat(photos.absolute_path(0))
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_size == times.st_size and os.stat(file).st_mtime_ns == times.st_mtime_ns
    assert torch.equal(source.read(0)[IMAGE], 255 - before[0])
    file.unlink()
    with pytest.raises(UnreadableImage):
        source.read(0)


def test_loader_workers_fill_it_and_files_in_it_are_not_read_again(photos, tmp_path):
    source = cached(photos, tmp_path / "cache")
    machine = LoaderMachine(torch.device("cpu"), channels_last=False, workers=2, prefetch_batches=2)
    views = {"images": lambda image, draw: image[:, :30, :40].float()}

    def epoch():
        loader = Loader(photos, source, views, no_fields, machine, print, training=False)
        batches = EvaluationStream(loader, range(COUNT), 4)
        return torch.cat([batch["images"] for batch in batches])

    first = epoch()
    assert all(map(source.has, range(COUNT)))
    assert torch.equal(epoch(), first) and counted(source) == (COUNT, COUNT)
    readings = source.readings()
    assert readings.pop("l2_hit_rate") == 0.5 and readings.pop("l2_gib") > 0 and not readings


def test_a_full_disk_is_one_warning(photos, small_disk, log):
    shutil.copytree(photos.root, small_disk / "more")  # half of the disk
    source = cached(photos, small_disk / "cache")
    for number in range(80):
        source.key_of = functools.partial(image_key, source.inner.contents, inputs=str(number))
        assert_equal(read_all(source), read_all(source.inner))
    warned = [record for record in log.records if record.getMessage().startswith("data.cache.folder")]
    assert len(warned) == 1 and source.counts()["refused"] > 0


def test_a_filled_cache_on_a_read_only_disk_is_read(photos, small_disk, log):
    expected = read_all(cached(photos, small_disk / "cache"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    source = cached(photos, small_disk / "cache")
    assert_equal(read_all(source), expected)
    assert counted(source) == (COUNT, 0) and source.readings()["l2_gib"] > 0
    write_noise(photos.absolute_path(0), 99)
    assert_equal(read_all(source), read_all(source.inner))
    assert len([line for line in log.messages if line.startswith("data.cache.folder")]) == 1


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_folder_that_cannot_be_used_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("^data.cache.folder: "):
        cached(photos, tmp_path / "file" / "cache")
