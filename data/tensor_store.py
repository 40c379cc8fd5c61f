"""Records of tensors on disk, found by their keys: what the caches of latents and texts are kept in.

    store = TensorStore(Path("outputs/cache/latents"), "cache.latents")
    store.put(key, "photos/a.png", {"latent_mean": mean}); ...; store.finish()
    store.read(key)

A store is a folder of safetensors files (shards), each with stacked records of one shape; its metadata list their keys
and checksums, so the shards are their own manifest. A shard is written once, complete or not at all, by one rank:
SIGKILL loses what was not written yet, and nothing else. Checksums are compared when the store is opened, of shards
that are new or changed since; damaged ones are set aside. What is read is compared as well.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.source import Record
from utils.errors import UserError
from utils.io.checksums import sum_words
from utils.io.files import canonical_json, output_errors, set_aside, sha256_text, write_atomically
from utils.io.memo import measure_once
from utils.io.weights import read_header, read_tensors, write_tensors
from utils.ranks import distributed

STORED = torch.float16  # of what networks give; records are read as float32
_SHARD_RECORDS = 256
_KEY = "S32"
# Where the records are, sorted by key. The shard is a number in `TensorStore._shards`.
_INDEX = np.dtype([("key", _KEY), ("shard", np.int32), ("place", np.int32), ("checksum", np.uint64)])


class MissingRecord(LookupError):
    """No record of a key, or a damaged one; the text says which."""


def record_key(*parts: Any) -> str:
    """Return the key of what a record was made from, JSON values: 32 hexadecimal digits."""
    return sha256_text(canonical_json(parts))[:32]


class TensorStore:
    """The records of a folder. Picklable; each process opens the shards itself.

    key: the configuration key that names the folder. All ranks open a store together and call `finish` together.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._waiting: dict[str, Record] = {}
        self._open()

    def _open(self) -> None:
        self._opened: dict[int, Record] = {}
        self._shards, self._index = distributed.rank_zero_call(self._read_index)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open shards out."""
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._index)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return whether there is a record of each key, bool [N]."""
        return np.isin(keys.astype(_KEY), self._index["key"])

    def read(self, key: str) -> Record:
        """Return a record, views of a mapped file: to be read only. Raises MissingRecord."""
        at = int(np.searchsorted(self._index["key"], np.array(key, dtype=_KEY)))
        if at == len(self) or self._index["key"][at].decode() != key:
            raise MissingRecord("not in the cache")
        _, shard, place, checksum = self._index[at].item()
        path = self.folder / self._shards[shard]
        try:
            if shard not in self._opened:
                with safe_open(path, "pt") as stored:  # maps the file; its tensors are views that keep the map
                    self._opened[shard] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            record = {name: tensor[place] for name, tensor in self._opened[shard].items()}
        except (SafetensorError, OSError) as error:
            raise MissingRecord(f"{path} cannot be read ({error})") from None
        if _checksum(record) != checksum:
            with suppress(OSError):
                os.utime(path)  # as changed, it is checked at the next start
            raise MissingRecord(f"{path} is damaged; the next start makes it again")
        return record

    def put(self, key: str, name: str, record: Mapping[str, Tensor]) -> None:
        """Add a record, to be written with the next ones of its shape; name: what it is of, for messages.

        Raises UserError where a value is not finite, or the disk refuses a shard.
        """
        record = {part: tensor.detach().cpu() for part, tensor in record.items()}
        if not all(tensor.isfinite().all() for tensor in record.values()):
            raise UserError(
                f"{self.key}: {name} gives values that are not finite (NaN, infinite), which are not cached; encode in "
                "float32 or bfloat16, or with weights that are made for float16"
            )
        others = next(iter(self._waiting.values()), record)
        if len(self._waiting) == _SHARD_RECORDS or _shapes(others) != _shapes(record):
            self._flush()
        self._waiting[key] = record

    def finish(self) -> None:
        """Write what is waiting and make the records of all ranks readable."""
        self._flush()
        distributed.barrier()
        self._open()

    def _flush(self) -> None:
        """Write the waiting records as a shard."""
        if not self._waiting:
            return
        keys, records = list(self._waiting), list(self._waiting.values())
        tensors = {part: torch.stack([record[part] for record in records]) for part in records[0]}
        metadata = {"keys": json.dumps(keys), "sums": json.dumps(list(map(_checksum, records)))}
        file = self.folder / f"{record_key(keys)}.safetensors"
        with output_errors(self.key, file):
            write_atomically(file, lambda temporary: write_tensors(temporary, tensors, metadata))
        self._waiting = {}

    def _read_index(self) -> tuple[list[str], np.ndarray]:
        """Return the names and the index of the folder's whole shards, and set the others aside."""
        paths, rows = sorted(self.folder.glob("*.safetensors")), []
        checked = self.folder / "checked.jsonl"
        is_whole = measure_once(paths, lambda new: map(self._check, new), checked, "checking the cache", is_kept=bool)
        shards = [path for path, whole in zip(paths, is_whole) if whole]
        for number, path in enumerate(shards):
            parts = enumerate(zip(*self._read_lists(path)))
            rows += [(key.encode(), number, place, checksum) for place, (key, checksum) in parts]
        return [path.name for path in shards], np.sort(np.array(rows, dtype=_INDEX), order="key")

    def _read_lists(self, path: Path) -> tuple[list[str], list[int]]:
        """Return a shard's keys and checksums. Raises UserError, ValueError or KeyError where it has none."""
        metadata = read_header(path, self.key).metadata
        return json.loads(metadata["keys"]), json.loads(metadata["sums"])

    def _check(self, path: Path) -> bool:
        """Return whether a shard is whole; set it aside where it is not."""
        try:
            keys, checksums = self._read_lists(path)
            tensors = read_tensors(path, self.key)
            if [_checksum(dict(zip(tensors, parts))) for parts in zip(*tensors.values())] != checksums:
                raise ValueError("its records do not match their checksums")
            return len(keys) == len(checksums)
        except (UserError, ValueError, KeyError) as error:
            why = "is of another version" if isinstance(error, KeyError) else f"is damaged ({error})"
            with output_errors(self.key, path):
                set_aside(path, why)
            return False


def _shapes(record: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in record.items()}


def _checksum(record: Mapping[str, Tensor]) -> int:
    """Return the sum of the words of a record's tensors, modulo 2**64."""
    parts = (tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in record.values())
    return sum(map(sum_words, parts)) % 2**64
