"""The store of tensors: round trips, damage, several ranks, and SIGKILL while it is filled."""

import multiprocessing
import os
import pickle
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data import tensor_store
from data.tensor_store import MissingRecord, TensorStore, record_key
from utils.errors import UserError
from utils.io.files import sha256_file

KEYS = [record_key("record", number) for number in range(40)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(tensor_store, "_SHARD_RECORDS", 4)


def make_record(number):
    """Return tensors of two dtypes, in one of two shapes."""
    values = torch.randn(2, 3 + number // 20, generator=torch.Generator().manual_seed(number))
    return {"mean": values.half(), "logvar": (values + 1).bfloat16()}


def fill(folder, numbers=range(40), pause=0.0):
    """Put the records that are missing, as a cache does."""
    store = TensorStore(folder, "cache.test")
    missing = ~store.has(np.array(KEYS))
    for number in numbers:
        if missing[number]:
            store.put(KEYS[number], f"{number}.png", make_record(number))
            time.sleep(pause)
    store.finish()
    return store


def assert_whole(store, numbers=range(40)):
    for number in numbers:
        record, expected = store.read(KEYS[number]), make_record(number)
        assert record.keys() == expected.keys() and all(torch.equal(record[name], expected[name]) for name in record)
        assert all(record[name].dtype == expected[name].dtype for name in record)


def shards(folder):
    return {file.name: sha256_file(file) for file in folder.glob("*.safetensors")}


def test_records_come_back_and_are_written_once(tmp_path):
    store = fill(tmp_path, range(38))
    assert len(store) == 38 and len(shards(tmp_path)) == 10  # two shapes: 5 and 4.5
    assert_whole(store, range(38))
    assert_whole(pickle.loads(pickle.dumps(store)), range(38))
    assert store.has(np.array([KEYS[:2], KEYS[-2:]])).tolist() == [[True, True], [False, False]]
    with pytest.raises(MissingRecord):
        store.read(KEYS[39])
    before = shards(tmp_path)
    assert_whole(fill(tmp_path))
    assert before.items() <= shards(tmp_path).items()


def test_a_second_start_reads_no_tensors(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr(tensor_store, "read_tensors", lambda *given: pytest.fail("read again"))
    assert len(TensorStore(tmp_path, "cache.test")) == 40


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty"])
def test_a_damaged_shard_is_set_aside_and_filled_again(tmp_path, damage, log):
    fill(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[2]
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-3] ^= 4
    file.write_bytes({"cut": content[:-7], "bit": content, "header": b"x" + content[1:], "empty": b""}[damage])
    others = {name: digest for name, digest in shards(tmp_path).items() if name != file.name}
    assert len(TensorStore(tmp_path, "cache.test")) == 36 and file.name in log.text
    assert_whole(fill(tmp_path))
    assert others.items() <= shards(tmp_path).items() and len(list(tmp_path.glob("*.damaged-0"))) == 1


def test_damage_while_a_run_reads_is_found_and_checked_at_the_next_start(tmp_path):
    store = fill(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    missing = 0
    for key in KEYS:
        try:
            store.read(key)
        except MissingRecord:
            missing += 1
    assert missing == 1
    assert len(TensorStore(tmp_path, "cache.test")) == 36


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    store = TensorStore(tmp_path, "cache.test")
    with pytest.raises(UserError, match=r"^cache\.test: 7\.png "):
        store.put(KEYS[0], "7.png", {"mean": torch.tensor([1.0, float("inf")])})


def test_a_full_disk_is_a_users_error(small_disk):
    store = TensorStore(small_disk / "store", "cache.test")
    with pytest.raises(UserError, match=r"^cache\.test: .*cannot be written"):
        for number in range(8):
            store.put(KEYS[number], "large", {"mean": torch.randn(200_000)})


# --- processes


def test_no_record_is_bad_and_no_shard_is_lost_after_sigkill(tmp_path):
    forks, kept = multiprocessing.get_context("fork"), {}
    killed = 0
    for round_ in range(4):
        process = forks.Process(target=fill, args=(tmp_path, range(40), 0.002))
        process.start()
        deadline = time.monotonic() + 30
        while len(shards(tmp_path)) < len(kept) + 1 + round_ % 2 and process.is_alive():
            assert time.monotonic() < deadline
        time.sleep(0.0017 * round_)  # at another moment of the next shard
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        found = shards(tmp_path)
        assert kept.items() <= found.items()
        kept = found
        known = TensorStore(tmp_path, "cache.test")
        assert_whole(known, np.flatnonzero(known.has(np.array(KEYS))).tolist())
    assert killed > 1
    assert_whole(fill(tmp_path))
    assert kept.items() <= shards(tmp_path).items() and not list(tmp_path.glob("*.damaged-*"))


def _be_rank(rank, folder):
    address = f"file://{folder}/meet"
    dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=2, rank=rank)
    store = fill(folder / "store", range(rank, 40, 2))
    assert_whole(store)
    dist.destroy_process_group()


def test_ranks_fill_shards_of_their_own_and_read_all(tmp_path):
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=_be_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_whole(TensorStore(tmp_path / "store", "cache.test"))
