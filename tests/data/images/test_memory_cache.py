"""Decoded images in shared memory: hits equal misses, writers are killed, ranks share, a device has a copy, `auto`."""

import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import windows
from data.augment.config import AugmentConfig
from data.augment.steps import TrainTransform, evaluation_views, training_views
from data.images import caches
from data.images.bytes import Images
from data.images.caches import GIB, Cached, Pool, _choose_budget, _share_pool, keep_in_memory
from data.images.decode import Decoder
from data.images.disk_cache import keep_on_disk
from data.open import Data
from data.stream.loader import Loader, no_fields
from data.stream.order import Draw
from data.stream.source import UnreadableImage
from tests.data.augment.test_on_device import ALL, config_of
from tests.data.collection.test_collection import load
from tests.support import cache_config, read_conf
from utils.contracts import LoaderMachine
from utils.ranks import distributed

FORK = multiprocessing.get_context("fork")
SIZES_WH = ((40, 30), (64, 200), (25, 25), (300, 90))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(12):
        width, height = SIZES_WH[number % 4]
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"{number:02}.png")
    (root / "99.png").write_bytes(b"no image")
    return load(root, root.parent / "cache")


def images(collection, shortest_px=None, channels=3):
    return Images(collection, Decoder(channels, 10**6, "white", shortest_px=shortest_px))


def cached(collection, **changes):
    return Cached(images(collection, **changes), Pool.create(len(collection), 2**22), int, "l1")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shortest_px", [None, 50])
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_a_hit_a_miss_and_no_cache_are_equal_in_pixels_and_strides(collection, name, shortest_px, channels, tmp_path):
    plain = images(collection, shortest_px, channels)
    on_disk = keep_on_disk(plain, cache_config(folder=str(tmp_path), disk_gib=0.05))
    kept = on_disk if name == "l2" else cached(collection, shortest_px=shortest_px, channels=channels)
    for row in range(12):
        direct, miss, hit = (source.read(row)["image"] for source in (plain, kept, kept))
        assert torch.equal(direct, miss) and torch.equal(miss, hit)
        first = 1 if channels == 1 else 0  # the stride of one channel means nothing
        assert direct.stride()[first:] == miss.stride()[first:] == hit.stride()[first:]
    assert kept.readings() == {f"{name}_hit_rate": 0.5, f"{name}_gib": kept.records.used_bytes() / GIB}


def test_an_unreadable_image_is_refused_each_time(collection):
    kept = cached(collection)
    for _ in range(2):
        with pytest.raises(UnreadableImage):
            kept.read(12)
    assert not kept.records.has(12)


def test_no_transform_changes_what_is_kept(collection):
    values = read_conf("augment/light")
    values |= {"image_size_hw": [25, 25], "crop_scale": [1.0, 1.0], "random_erasing": 1.0}
    others = {
        "pad": "square", "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": {"strength": 0.4, "hue": 0.1},
        "affine": {"degrees": 5.0, "translate": 0.1, "scale": [0.9, 1.1], "shear_degrees": 5.0},
    }  # fmt: skip
    transforms = [TrainTransform(AugmentConfig(**values | changes)) for changes in (others, {})]
    transforms.append(evaluation_views({**values, "channels": 3, "eval_resize": "squash"})["images"])
    kept = cached(collection)
    before = [kept.read(row)["image"].clone() for row in range(12)]
    for transform in transforms:
        reader = Loader(collection, kept, {"images": transform}, no_fields, None, print, training=True)
        for row in range(12):
            reader.read(Draw(row, row, 7), [], reader.views)
    assert all(torch.equal(kept.read(row)["image"], image) for row, image in enumerate(before))


# ------------------------------------------------------------------------------------------------------------ the pool


def record_of(row):
    return bytes([row]) * 6000


def test_a_full_pool_keeps_the_first_images():
    pool = Pool.create(100, 5 * 6000 + 7)
    for row in range(100):
        pool.add(row, record_of(row))
    assert [row for row in range(100) if pool.has(row)] == [0, 1, 2, 3, 4]
    assert pool.get(4).tobytes() == record_of(4) and pool.get(5) is None


def test_no_image_is_added_where_memory_runs_out(monkeypatch):
    pool = Pool.create(9, 2**20)
    monkeypatch.setattr(caches, "_CHECKED_BYTES", 10_000)
    monkeypatch.setattr(caches, "free_memory", lambda: 0)
    for row in range(9):
        pool.add(row, record_of(row))
    assert [row for row in range(9) if pool.has(row)] == [0]


def fill(pool, first):
    for number in range(2000):
        row = (first + number) % 2000
        if (record := pool.get(row)) is not None:
            assert record.tobytes() == record_of(row % 251)
        pool.add(row, record_of(row % 251))


def test_killed_writers_leave_no_bad_image():
    pool = Pool.create(2000, 2000 * 6000 * 2)
    for number in range(12):
        writers = [FORK.Process(target=fill, args=(pool, 150 * number + 700 * place)) for place in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.01 + 0.005 * number)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    kept = [row for row in range(2000) if pool.has(row)]
    assert len(kept) > 100
    fill(pool, 0)  # which checks each image that it finds
    assert all(map(pool.has, range(2000)))


def rank_of_two(rank, pipe, found):
    """Share a pool as one of two ranks, joined by a pipe."""

    def gather(value):
        pipe.send(value)
        other = pipe.recv()
        return [value, other] if rank == 0 else [other, value]

    distributed.gather_objects, distributed.rank = gather, lambda: rank
    pool = _share_pool(4, lambda: 2**20)
    pool.add(rank, record_of(rank))
    gather(None)
    found.put([int(pool.get(row)[0]) for row in (0, 1)])


def test_two_ranks_share_one_pool():
    found = FORK.Queue()
    ranks = [FORK.Process(target=rank_of_two, args=(rank, end, found)) for rank, end in enumerate(FORK.Pipe())]
    for process in ranks:
        process.start()
    assert [found.get(timeout=240) for _ in ranks] == [[0, 1], [0, 1]]
    for process in ranks:
        process.join()


# --------------------------------------------------------------------------- the copy on a device, here the CPU itself

CPU = torch.device("cpu")
GREY = {"on_device": False, "horizontal_flip": 0.5, "interpolation": "bilinear", "channels": 1}


def read_epochs(collection, workers, changes):
    """Return the images of four epochs, and of another one after the copy is dropped."""
    source = cached(collection, channels=changes.get("channels", 3))
    data = Data(collection, source, LoaderMachine(CPU, True, workers, 2), seed=3, batch_size=4, run_path=None)
    stream = data.train(range(12), no_fields, training_views(config_of(**changes)))
    steps = stream.steps(0, 4, 4)
    images = [stream.prepare(next(steps)[0])["images"] for _ in range(12)]
    stream.drop_copy()
    return torch.cat([*images, *(stream.prepare(next(steps)[0])["images"] for _ in range(3))]).int()


@pytest.mark.parametrize("workers, changes", [(0, GREY), (2, ALL)])
def test_what_a_device_cuts_equals_what_workers_cut_to_rounding(collection, workers, changes, monkeypatch):
    expected = read_epochs(collection, workers, changes)
    monkeypatch.setattr("data.open.can_cut", lambda device: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**33,))
    monkeypatch.setattr(windows, "_PART_BYTES", 200_000)
    distance = (read_epochs(collection, workers, changes) - expected).abs()
    # Colours make more of a level.
    assert distance.max() <= (4 if changes is ALL else 2) and distance.gt(0).float().mean() < 0.05
    assert distance[44:48].any()  # the device made them
    assert distance[48:52].any() == (workers > 0)  # of a worker, before the copy was dropped


@pytest.mark.parametrize("free, most", [(2**28, [300, 300, 1]), (2**24, None)])
def test_workers_cut_what_is_being_written_or_larger_than_nearly_all_or_does_not_fit(free, most, monkeypatch):
    """A panorama has windows that are no longer than its height allows. The tables of weights count."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: pinned.append(part) or part)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free,))
    monkeypatch.setattr(windows, "_ENOUGH", 0.5)
    monkeypatch.setattr(windows, "_MOST_SIDE", 400)
    pool = Pool.create(8, 2**20)
    pool._room[0] += 50  # as `add`, before it has written
    largest = [(390, 300), (370, 450), (380, 500)]  # the highest, one wider than may be, the widest
    for row, (height, width) in enumerate([(50, 600), (300, 300), (400, 90), (40, 50), *largest]):
        pool.add(row, caches.HEAD.pack(height, width, 1) + bytes(height * width))
    view = windows.Windows(pool, training_views(config_of(1, crop_ratio=[0.75, 1.25])), CPU, np.arange(8))
    view.refresh()
    assert not view.has([0])  # a part at each step
    view.refresh()
    assert [view.has([row]) for row in range(8)] == [*[most is not None] * 4, *[False] * 4]
    assert len(pinned) == (most is not None)
    assert most is None or view._most == most


# ------------------------------------------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("gib, kept", [(0, False), ("auto", True)])
def test_images_are_kept_as_configured(collection, gib, kept):
    source = keep_in_memory(images(collection), collection, cache_config(memory_gib=gib))
    assert isinstance(source, Cached) is kept


@pytest.mark.parametrize(
    "gib, share, low, high",
    [("auto", 1.1, 0, 0.55), ("auto", 0.9, -1, 0), (0.5, 4.0, 0.4, 0.5), (8.0, 4.0, 3.9, 4.0)],
)
def test_auto_keeps_images_where_half_fit_into_half_of_the_memory_and_a_number_what_is_free(
    collection, monkeypatch, caplog, gib, share, low, high
):
    """share, low, high: of the size of all images, which is a GiB for a number."""
    source = images(collection)
    whole = sum(source.read(row)["image"].numel() for row in range(12)) / 12 * 13 if gib == "auto" else GIB
    monkeypatch.setattr(caches, "free_memory", lambda: int(share * whole))
    with caplog.at_level(logging.INFO):
        budget = _choose_budget(source, collection, gib)
    assert low * whole < budget <= high * whole
    assert ("data.cache.memory_gib" in caplog.text) is (budget == 0 or gib == 8.0)
