"""The keyed store: round trips, damage, a limit, a full disk, and writers that are killed."""

import numpy as np
import pytest
import torch

from data.images.record_store import LimitedStore, Store, TensorStore, record_key
from tests.support import assert_same_tensors, refuses

MANY = [record_key("record", number) for number in range(140)]
KEYS = MANY[:40]
RECORD = {"mean": torch.randn(2, 3).half(), "logvar": torch.randn(2, 3).bfloat16()}


def content_of(key, size=20_000):
    return np.random.default_rng(int(key, 16)).bytes(size)


def test_records_of_tensors_come_back(tmp_path):
    store = TensorStore(tmp_path, "cache.test")
    store.put(KEYS[0], "7.png", RECORD)
    assert_same_tensors(store.read(KEYS[0]), RECORD)
    assert store.read(KEYS[1]) is None and store.is_missing(np.array(KEYS[:2])).tolist() == [False, True]
    with refuses(r"^cache\.test: 7\.png "):
        store.put(KEYS[0], "7.png", {"mean": torch.tensor([1.0, float("inf")])})


def test_a_full_disk_is_a_users_error(small_disk):
    store = TensorStore(small_disk / "store", "cache.test")
    with refuses(r"^cache\.test: .*cannot be written"):
        for key in KEYS:
            store.put(key, "large", {"mean": torch.randn(200_000)})


@pytest.mark.parametrize("damage", ["cut", "bit", "zeros", "empty"])
def test_a_damaged_record_is_none(tmp_path, damage):
    store = Store(tmp_path)
    store.put(KEYS[0], content_of(KEYS[0]))
    (file,) = store.files()
    whole = file.read_bytes()
    bad = {"cut": whole[:-7], "bit": whole[:-1] + bytes([whole[-1] ^ 4]), "zeros": bytes(len(whole)), "empty": b""}
    file.write_bytes(bad[damage])
    assert store.get(KEYS[0]) is None and not store.has(KEYS[0])


def test_the_oldest_records_make_room(tmp_path):
    kept = LimitedStore(tmp_path, 4 << 20)
    for number, key in enumerate(MANY):
        kept.add(key, content_of(key, 10 + 600 * number))
    found = [key for key in MANY if kept.has(key)]
    assert 5 < len(found) < 100 and found == MANY[-len(found) :]
    assert all(kept.get(key).tobytes() == content_of(key, 10 + 600 * MANY.index(key)) for key in found)
    assert 3 << 20 < kept.used_bytes() == sum(file.stat().st_size for file in kept.files()) <= 4 << 20
    kept.add(KEYS[0], bytes(4 << 20))
    assert not kept.has(KEYS[0])
    (tmp_path / "used").write_text("damaged")
    assert LimitedStore(tmp_path, 4 << 20).used_bytes() == sum(file.stat().st_size for file in kept.files())
