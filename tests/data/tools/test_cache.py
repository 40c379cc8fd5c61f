"""job=cache: what it lists of records and their users, and that it removes nothing else than old, unused records."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import CacheConfig
from data.images.bytes import Images
from data.images.decode import Decoder
from data.images.disk_cache import keep_on_disk
from data.images.record_store import TensorStore
from tests.data.collection.test_collection import load
from tests.in_process import TINY, make_images, run
from tests.support import refuses

JOB = ["job=cache", "data=image_folder", "data.root=photos", "data.validation_fraction=0.0"]
KEYS = np.array([f"{number:032x}" for number in range(4)])


@pytest.fixture
def manage(tmp_path):
    """Return what runs the job."""
    return lambda *words: run("prepare", [*JOB, *words], tmp_path)


def age(paths, days=40):
    for path in paths:
        os.utime(path, (time.time() - 86_400 * days,) * 2)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Return the folder of four cached images and of three latents."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    levels = np.arange(40 * 30 * 3).reshape(40, 30, 3)
    for number in range(4):
        Image.fromarray((levels // (number + 16)).astype(np.uint8)).save(f"photos/{number}.png")
    collection = load(Path("photos"), tmp_path / "outputs/cache/collections")
    cached = keep_on_disk(
        Images(collection, Decoder(3, 10**6)), CacheConfig(memory_gib=0.0, folder="outputs/cache/images", disk_gib=0.1)
    )
    for row in range(4):
        cached.read(row)
    store = TensorStore(tmp_path / "outputs/cache/latents", "key")
    for key in KEYS[:3].tolist():
        store.put(key, key, {"mean": torch.zeros(4, 2, 2, dtype=torch.float16)})
    assert store.is_missing(KEYS[1:]).tolist() == [False, False, True]
    store.finish()
    return tmp_path / "outputs/cache"


def test_caches_are_listed(stores, log, manage):
    assert manage().startswith("0 files (0 GiB) not used for 30 days")
    lines = [line.split() for message in log.messages for line in str(message).splitlines()]
    found = {Path(words[0]).name: words[1] for words in lines if words and words[0].startswith("outputs/cache/")}
    assert found.keys() == {"collections", "images", "latents"} and found["latents"] == "4"  # with its mark
    text = "".join(map(str, log.messages))
    assert "mean F16 [4, 2, 2]" in text


def test_only_old_records_that_nothing_reads_are_removed(stores, tmp_path, manage):
    records = list(stores.glob("*/[0-9a-f][0-9a-f]/*"))
    foreign = tmp_path / "outputs/cache/photos/ab" / KEYS[0]  # of a user, named by its hash
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"x")
    age([*records, foreign])
    TensorStore(stores / "latents", "key").read(KEYS[1])  # a run, that began when the record was as old
    assert manage().endswith("not used for 30 days: job.apply=true removes them")
    assert all(file.exists() for file in records)
    assert manage("job.apply=true").startswith("6 files")
    assert [file.name for file in records if file.exists()] == [KEYS[1]] and foreign.exists()


def test_a_training_after_a_fill_reads_no_image_file(tmp_path, monkeypatch):
    data = ["data=image_folder", f"data.root={make_images(tmp_path / 'photos')}"]
    with refuses("data.cache.disk_gib"):
        run("prepare", ["job=cache", "job.fill=true", *data], tmp_path)
    data += ["data.cache.disk_gib=0.1", f"data.cache.folder={tmp_path}/kept"]
    assert run("prepare", ["job=cache", "job.fill=true", *data], tmp_path).startswith("12 of 12 images")
    read = []
    monkeypatch.setattr(Images, "read", lambda self, row, *others: read.append(row))
    run("train", [*TINY, *data, "run_dir=run"], tmp_path)
    assert not read and (tmp_path / "run/complete.json").exists()
