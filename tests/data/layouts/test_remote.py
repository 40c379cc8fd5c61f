"""Shards in an object store: a local S3 server stands for it; what it refuses, lacks, cuts or holds back is said."""

import pytest

from data.augment.steps import evaluation_views
from data.images.bytes import open_contents
from data.images.remote_shards import NO_ANSWER
from data.open import open_images
from data.stream.loader import no_fields
from data.stream.order import build_sampler
from data.stream.source import UnreadableImage
from tests.data.collection.test_collection import load
from tests.data.stream.test_loader import stream, take
from tests.support import data_config, make_collection, pack_collection, refuses, write_manifest

BUCKET = "s3://pictures"


@pytest.fixture(scope="module")
def place(tmp_path_factory, store):
    """Return a folder with the files of a collection and its shards, which a local server has too."""
    place = tmp_path_factory.mktemp("remote")
    make_collection(place / "files", per_class=20, validation=2)
    write_manifest(place / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tools.pack._MIB", 2**16)
        pack_collection(load(place / "files", place / "cache"), place / "packed")
    store.mkdir(BUCKET)
    store.put(str(place / "packed"), f"{BUCKET}/packed", recursive=True)
    return place


@pytest.fixture
def packed(place):
    return load(f"{BUCKET}/packed", place / "cache")


def test_a_remote_collection_is_the_collection(packed, place):
    files = load(place / "files", place / "cache")
    assert packed.fingerprint == files.fingerprint and str(packed.root) == f"{BUCKET}/packed"
    contents = open_contents(packed)
    contents.prefetch(range(50))
    assert [*map(contents.read, range(len(packed)))] == [*map(open_contents(files).read, range(len(files)))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_what_the_files_give(workers, packed, place):
    sizes = {"image_size_hw": [32, 32], "pad": "none", "eval_resize": "squash", "eval_crop": 1.0}
    levels = {"channels": 3, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    views = evaluation_views({**sizes, **levels, "background": "white"})
    config = data_config(max_pixels=10**6)
    found, rows = [], packed.rows("train")
    for collection in (packed, load(place / "files", place / "cache")):
        source, sampler = open_images(collection, config, {"channels": 3}), build_sampler("shuffled", rows, packed, 0)
        loader = stream(collection, source, views, no_fields, sampler, workers=workers)
        found.append([batch["images"] for step in take(loader, 2, 24) for batch in step])
        assert loader.unreadable_count == 0
    assert all((one == two).all() for one, two in zip(*found, strict=True))


def refused(packed, row=0):
    with pytest.raises(UnreadableImage) as error:
        open_contents(packed).read(row)
    assert packed.row(row).shard in str(error.value)
    return error.value


def test_what_the_store_lacks_cuts_or_refuses_is_an_unreadable_image(packed, store, place, monkeypatch):
    view = packed.row(0)
    path, offset, length = f"{BUCKET}/packed/{view.shard}", view.offset, view.length
    whole = store.cat_file(path)
    try:
        store.pipe_file(path, whole[: offset + length - 10])
        assert refused(packed).kind == "the file is cut off"
        store.rm(path)
        assert refused(packed).kind == NO_ANSWER
    finally:
        store.pipe_file(path, whole)
    monkeypatch.setattr(store, "cat_ranges", lambda paths, *a, **k: [PermissionError("Forbidden")] * len(paths))
    error = refused(packed)
    assert error.kind == NO_ANSWER and "PermissionError" in error.reason


def test_what_cannot_be_had_ends_the_start(place, store, monkeypatch):
    with refuses(r"^data\.root: .*'s3://pictures/absent'.*FileNotFoundError"):
        load(f"{BUCKET}/absent", place / "cache")
    store.put(str(place / "files/manifest.parquet"), f"{BUCKET}/files/manifest.parquet")
    with refuses(r"^data\.root: manifest\.parquet lists files"):
        load(f"{BUCKET}/files", place / "cache")
    with refuses(r"^data\.root: 'nonsense://x'.*install-cloud"):
        load("nonsense://x", place / "cache")
    monkeypatch.setattr(store, "cat_file", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
    with refuses(r"^data\.root: .*PermissionError"):
        load(f"{BUCKET}/packed", place / "cache")
