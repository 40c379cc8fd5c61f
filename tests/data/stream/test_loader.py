"""Readers and loaders. Purity over workers, ranks and stray draws, unreadable images, ragged fields, transforms."""

import hashlib
import json
import multiprocessing
import os
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.config import AugmentConfig
from data.augment.steps import TrainTransform
from data.collection.choose import training_rows
from data.images.bytes import Images
from data.images.decode import Decoder
from data.stream.batch import Ragged, collate, multi_hot, pack, to_device
from data.stream.loader import Loader, TrainStream, UnreadableLog
from data.stream.order import Draw, Sampler
from tests.data.collection.test_collection import load
from tests.support import placed, read_conf, refuses, rows
from utils import rng
from utils.contracts import LoaderMachine

# More workers than cores are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
CPU = torch.device("cpu")
GLOBAL = 32
ALWAYS = ("sample_id", "key", "weight")
ALL = dict.fromkeys(("find", "per_class", "count"))
SIZE = [24, 16]


def augment(**changes):
    values = read_conf("augment/light")
    return AugmentConfig.model_validate(values | {"image_size_hw": SIZE} | changes)


def write_image(path, seed, size_wh=(30, 22)):
    """Write a PNG of noise: any crop of it differs from any other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(placed(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training images."""
    root = tmp_path_factory.mktemp("noise")
    for number in range(40):
        write_image(root / "train" / "a" / f"{number:02}.png", number, (20 + number % 13, 40 - number % 7))
    return load(root, root.parent / "cache")


class DrawnFields:
    """What a task adds: a number drawn from the sample's generator, and a ragged field."""

    def __call__(self, example):
        drawn = torch.rand((), generator=example.generator)
        return {"drawn": drawn, "tag_ids": Ragged(torch.arange(example.draw.index % 4))}


def stream(collection, source, views, fields, sampler, *, workers=0, prefetch=2, file=None):
    machine, unreadable = LoaderMachine(CPU, False, workers, prefetch), UnreadableLog(file)
    loader = Loader(collection, source, views, fields, machine, unreadable.add, training=True)
    return TrainStream(loader, sampler, unreadable)


def view_stream(collection, transform, fields=None, *, workers=0, prefetch=2, file=None, **views):
    source, sampler = Images(collection, Decoder(3, 10**6)), Sampler(collection.rows("train"), 0)
    views, fields = {"images": transform, **views}, fields or DrawnFields()
    return stream(collection, source, views, fields, sampler, workers=workers, prefetch=prefetch, file=file)


def train_stream(collection, *, fields=None, workers=0, prefetch=2, file=None, **changes):
    transform = TrainTransform(augment(**changes))
    return view_stream(collection, transform, fields, workers=workers, prefetch=prefetch, file=file)


def take(loader, steps, micro=GLOBAL, between=lambda: None):
    """Return so many steps, lists of micro-batches."""
    found, read = [], loader.steps(0, GLOBAL, micro)
    for _ in range(steps):
        found.append(next(read))
        between()
    read.close()
    return found


def weighted(tmp_path, weights):
    """A collection of images with these weights."""
    for number in range(len(weights)):
        write_image(tmp_path / "images" / f"{number}.png", number)
    lines = [{"path": f"{number}.png", "weight": weight} for number, weight in enumerate(weights)]
    (tmp_path / "images" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load(tmp_path / "images", tmp_path / "cache")


def fingerprints(steps):
    """Per step and sample, in order: a hash of everything that it holds."""
    found = []
    for batches in steps:
        samples = []
        for batch in batches:
            offsets = batch["tag_ids_offsets"]
            for place in range(len(batch["key"])):
                digest = hashlib.sha256(batch["images"][place].numpy().tobytes())
                for name in (*ALWAYS, "drawn"):
                    digest.update(batch[name][place].numpy().tobytes())
                digest.update(batch["tag_ids"][offsets[place] : offsets[place + 1]].numpy().tobytes())
                samples.append(digest.hexdigest())
        found.append(samples)
    return found


# --- purity: "the augmented samples' hashes do not change"


PUBLISHED = {"rand_augment": "rand-m9-n3-p1-mstd0.5-inc1", "random_erasing": 0.5}


@pytest.mark.parametrize("workers, prefetch, micro", [(1, 1, 32), (7, 4, 8), (0, 2, 1)])
@pytest.mark.parametrize("changes", [{}, PUBLISHED])
def test_samples_do_not_change_with_workers_micro_batches_or_stray_draws(folder, changes, workers, prefetch, micro):
    """timm's policy draws from the generators of Python and NumPy, which belong to the process."""
    wanted = fingerprints(take(train_stream(folder, **changes), 3))

    def stray():
        torch.rand(random.randint(1, 50)), np.random.rand(3), random.random()

    random.seed(workers), np.random.seed(micro), torch.manual_seed(1234)
    steps = take(train_stream(folder, workers=workers, prefetch=prefetch, **changes), 3, micro, between=stray)
    assert all(len(batch["key"]) == micro for batches in steps for batch in batches)
    assert fingerprints(steps) == wanted


def test_shared_memory_without_room_for_a_batch_is_a_users_error(folder, monkeypatch):
    """The loader's queue would drop the batch, and its reader wait for ever; on a real one: engine/test_survival.py."""

    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with refuses(r"^runtime\.workers: .*No space left on device.* set runtime\.workers=0"):
        take(train_stream(folder, workers=1), 1)


def test_a_long_folder_for_sockets_and_too_many_files_are_no_hang(folder, monkeypatch, tmp_path, log):
    config = multiprocessing.current_process()._config
    monkeypatch.delitem(config, "tempdir", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 120)))
    for _ in range(2):
        assert len(take(train_stream(folder, workers=2), 2)) == 2
    assert log.text.count("TMPDIR") == 1 and len(config["tempdir"]) < 80

    def refuse(descriptor):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("multiprocessing.reduction.DupFd", refuse)  # in the thread of a worker that sends batches
    with refuses(r"^runtime\.workers: .*Too many open files.* set runtime\.workers=0"):
        take(train_stream(folder, workers=1), 1)


# --- what a batch holds


def test_a_batch_holds_bytes_ids_keys_and_weights(folder):
    ((batch,),) = take(train_stream(folder), 1)
    assert batch["images"].shape == (32, 3, *SIZE) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous()
    dtypes = {name: batch[name].dtype for name in ALWAYS}
    assert dtypes == {"sample_id": torch.int64, "key": torch.int64, "weight": torch.float32}
    assert batch["key"].tolist() == [rng.sample_key(0, position) for position in range(32)]
    assert batch["sample_id"].tolist() == [Sampler(folder.rows("train"), 0).at(n)[0] for n in range(32)]
    assert batch["weight"].tolist() == [1.0] * 32


def test_weights_of_the_manifest_reach_the_batch(tmp_path):
    collection = weighted(tmp_path, [0.0, 0.5, 1.0])
    loader = view_stream(collection, TrainTransform(augment())).loader
    rows = collection.rows("train").tolist()
    assert [(row, loader.read(Draw(0, row, 5), [], {})["weight"]) for row in rows] == [(1, 0.5), (2, 1.0)]
    assert loader.read(Draw(-1, 2, 1), [], {})["weight"] == 0.0  # padding


# --- unreadable images


@pytest.fixture
def damaged(tmp_path):
    """Eight images, three of which cannot be read: empty, cut off, and gone since the collection was indexed."""
    root = tmp_path / "images"
    for number in range(8):
        write_image(root / "train" / f"{number}.png", number)
    (root / "train" / "2.png").write_bytes(b"")
    whole = (root / "train" / "4.png").read_bytes()
    (root / "train" / "4.png").write_bytes(whole[: len(whole) // 2])
    collection = load(root, tmp_path / "cache")
    (root / "train" / "7.png").unlink()
    return collection


BROKEN = ["train/2.png", "train/4.png", "train/7.png"]


@pytest.mark.parametrize("workers", [0, 3])
def test_three_unreadable_files_are_blank_weigh_nothing_and_are_told_once(damaged, tmp_path, log, workers):
    file = tmp_path / "unreadable.jsonl"
    loader = train_stream(damaged, workers=workers, file=file)
    batches = [batch for step in take(loader, 3, 8) for batch in step]  # 96 samples: each file a dozen times
    assert [len(batch["weight"]) for batch in batches] == [8] * 12
    for batch in batches:
        weights = [float(damaged.row(row).path not in BROKEN) for row in batch["sample_id"].tolist()]
        assert batch["weight"].tolist() == weights
        assert batch["images"].flatten(1).any(1).tolist() == [weight > 0 for weight in weights]
    reasons = {row["path"]: row["reason"] for row in rows(file)}
    assert sorted(reasons) == BROKEN and len(rows(file)) == len(loader.unreadable.seen) == 3
    assert "empty" in reasons["train/2.png"] and "No such file" in reasons["train/7.png"] and reasons["train/4.png"]
    assert all(log.text.count(f"unreadable image {path}: ") == 1 for path in BROKEN)


def test_training_images_that_all_weigh_nothing_are_refused(tmp_path):
    with refuses(r"^data\.root: no training image .* 2 have weight"):
        training_rows(weighted(tmp_path, [0, 0]), SimpleNamespace(**ALL))


def test_torn_rows_are_passed_over_and_stay_apart_from_those_that_follow(tmp_path):
    file = tmp_path / "unreadable.jsonl"
    file.write_bytes('{"path": "a\u2028.png", "reason": "x"}\n'.encode() + b'\xff\0\n3\n{}\n\n{"path": "b.png", "rea')
    log = UnreadableLog(file)
    assert len(log.seen) == 1
    log.add([("a\u2028.png", "x"), ("b.png", "y")])
    assert file.read_bytes().endswith(b'\n{"path": "b.png", "rea\n{"path": "b.png", "reason": "y"}\n')
    before = file.read_bytes()
    again = UnreadableLog(file)
    again.add([("b.png", "y")])
    assert len(again.seen) == 2 and file.read_bytes() == before


class HangingFields(DrawnFields):
    """Never come back for one row; tell the process first."""

    def __init__(self, row, file):
        self.row, self.file = row, file

    def __call__(self, example):
        if example.draw.index == self.row:
            self.file.write_text(str(os.getpid()))
            time.sleep(3600)
        return super().__call__(example)


def test_a_worker_that_hangs_is_ended_with_the_stream(folder, tmp_path):
    """torch waits 5 s for it and sends SIGTERM, which workers ignore."""
    file, sampler = tmp_path / "pid", Sampler(folder.rows("train"), 0)
    first = {sampler.at(position)[0] for position in range(GLOBAL)}
    later = next(row for row in folder.rows("train").tolist() if row not in first)
    read = train_stream(folder, workers=1, fields=HangingFields(later, file)).steps(0, GLOBAL, GLOBAL)
    next(read)
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    read.close()
    while multiprocessing.active_children():  # buries the dead: not every torch release waits for whom it has ended
        assert time.monotonic() < end
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


# --- batches


@pytest.mark.parametrize("channels_last", [False, True])
def test_samples_are_joined_and_images_alone_have_the_memory_format_of_the_run(channels_last):
    """Also where a transform has made planes of some."""
    pixels = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
    images = [pixels, pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1).flip(-1)]
    samples = [
        {"images": image, "latent": image.float(), "key": 2**62 + n, "weight": 0.5} for n, image in enumerate(images)
    ]
    batch = collate(iter(samples), 2, channels_last=channels_last)
    for name, wanted in (("images", images), ("latent", [image.float() for image in images])):
        last = torch.channels_last if channels_last and name == "images" else torch.contiguous_format
        assert torch.equal(batch[name], torch.stack(wanted)) and batch[name].is_contiguous(memory_format=last)
    assert batch["key"].tolist() == [2**62, 2**62 + 1] and batch["weight"].dtype == torch.float32
    with pytest.raises(AssertionError):
        collate([samples[0], {**samples[1], "images": pixels[:1]}], 2)  # which could be broadcast


def test_a_packed_batch_keeps_values_types_and_strides():
    pixels = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 5, 7)
    batch = {"images": pixels.contiguous(memory_format=torch.channels_last), "key": torch.tensor([2**62, 1])}
    batch |= {"tags": torch.zeros(0, dtype=torch.int64), "flag": torch.tensor([True, False]), "one": torch.tensor(0.5)}
    found = pack(batch).unpack()
    torch.testing.assert_close(found, batch, rtol=0, atol=0, check_stride=True)


# --- ragged fields


@pytest.mark.parametrize("lists", [[[1, 2], [0], [3, 1, 4]], [[], [2], []], [[], [], []], [[0, 0, 3], [3]]])
def test_ragged_values_come_back_by_their_offsets_and_multi_hot_equals_a_slow_reference(lists):
    batch = collate([{"tags": Ragged(torch.tensor(ids, dtype=torch.int64))} for ids in lists], len(lists))
    offsets = batch["tags_offsets"].tolist()
    assert offsets[0] == 0 and len(offsets) == len(lists) + 1
    assert [batch["tags"][a:b].tolist() for a, b in zip(offsets, offsets[1:])] == lists
    slow = torch.zeros(len(lists), 5)
    for row, ids in enumerate(lists):
        slow[row, ids] = 1.0
    targets = multi_hot(batch["tags"], batch["tags_offsets"], 5)
    assert targets.dtype == torch.float32 and torch.equal(targets, slow)
    assert torch.equal(multi_hot(batch["tags"], batch["tags_offsets"][1:], 5), targets[1:])  # of a part of the batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_whole_behind_work_of_the_step_before():
    device = torch.device("cuda", 0)
    weight = torch.randn(4096, 4096, device=device)
    for number in range(20):
        batch = {"images": torch.full((64, 3, 128, 128), number, dtype=torch.uint8).pin_memory()}
        moved = to_device(pack(batch).pin_memory() if number % 2 else batch, device)["images"]
        weight = weight @ weight * 1e-4
        total = moved.sum(dtype=torch.int64)
        del moved, batch
        assert total.item() == number * 64 * 3 * 128 * 128


def test_terms_and_limits_choose_the_training_images(tmp_path):
    for name in ("cats/one", "cats/two", "dogs/one", "birds/one"):
        write_image(tmp_path / "images" / "train" / f"{name}.png", seed=len(name))
    write_image(tmp_path / "images" / "val" / "cats" / "three.png", seed=9)
    collection = load(tmp_path / "images", tmp_path / "cache")

    def chosen(find=None, is_usable=None, **limits):
        choice = SimpleNamespace(**ALL | {"find": find} | limits)
        return [collection.row(int(row)).path for row in training_rows(collection, choice, is_usable)]

    assert chosen() == chosen("path:.png") and len(chosen()) == 4
    assert chosen("path:train/cats/") == ["train/cats/one.png", "train/cats/two.png"]
    with refuses(r"^loop\.find: 'label=fish' finds none of the 4 training images"):
        chosen("label=fish")
    assert chosen(per_class=1, count=9) == [path for path in chosen() if path != "train/cats/one.png"]
    assert chosen(per_class=0.5) == chosen(per_class=1) and chosen(per_class=1.0) == chosen()
    assert chosen("label=cats", count=1) == ["train/cats/two.png"]  # of the lower hash
    others = np.array(["birds" not in collection.row(row).path for row in range(len(collection))])
    assert set(chosen(count=3)) > set(chosen(count=2)) and len(chosen(count=3)) == 3
    assert chosen(count=3, is_usable=others) == [path for path in chosen() if "birds" not in path]


# --- views, fields, sources, hooks


def test_views_have_keys_of_their_own_and_another_view_changes_none(folder):
    def read(*names):
        views = {name: lambda image, draw: torch.rand(4) for name in ("images", *names)}
        return view_stream(folder, None).loader.read(Draw(0, 0, 7), [], views)

    one, two, three = read(), read("second"), read("second", "third")
    assert torch.equal(one["images"], two["images"]) and torch.equal(two["second"], three["second"])
    assert len({tuple(three[name].tolist()) for name in ("images", "second", "third")}) == 3
    assert one["drawn"] == three["drawn"]
