"""Records of tensors on disk, found by their keys: what the caches of latents and texts are kept in.

    store = TensorStore(Path("outputs/cache/latents"), "cache.latents")
    store.put(key, "photos/a.png", {"latent_mean": mean}); ...; store.finish()
    store.read(key)

A store is a folder of safetensors files (shards), each with stacked records of one shape; its metadata list their keys,
names and checksums, so the shards are their own manifest. A shard is written once, complete or not at all, by one rank:
SIGKILL loses what was not written yet, and nothing else. `checked.json` has the size and time of change of shards whose
checksums were right; others are checked when the store is opened, and set aside where they are damaged.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import UserError
from utils.io.checksums import sum_words
from utils.io.files import (
    canonical_json,
    ignore_write_errors,
    output_errors,
    read_json,
    set_aside,
    sha256_text,
    write_atomically,
    write_json,
)
from utils.io.weights import read_header, read_tensors, write_tensors
from utils.ranks import distributed

STORED = torch.float16  # of what networks give; records are read as float32
_SHARD_RECORDS = 256
_ABANDONED_SEC = 86_400  # a temporary file this old has no writer
_KEY = "S32"
# Where the records are, sorted by key. The shard is a number in `TensorStore._shards`.
_INDEX = np.dtype([("key", _KEY), ("shard", np.int32), ("place", np.int32), ("checksum", np.uint64)])

Record = dict[str, Tensor]


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
        self._opened: dict[int, Record] = {}
        self._waiting: dict[str, tuple[str, Record]] = {}
        self._written: list[str] = []
        self._shards, self._index = self._read_index(())

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
        others = next(iter(self._waiting.values()), (name, record))[1]
        if len(self._waiting) == _SHARD_RECORDS or _shapes(others) != _shapes(record):
            self._flush()
        self._waiting[key] = (name, record)

    def finish(self) -> None:
        """Write what is waiting and make the records of all ranks readable."""
        self._flush()
        written = [name for names in distributed.gather_objects(self._written) for name in names]
        self._opened, self._written = {}, []
        self._shards, self._index = self._read_index(written)

    def orphans(self, keys: np.ndarray) -> list[str]:
        """Return the names of the records whose key is not among `keys`."""
        wanted = set(keys.astype(_KEY).reshape(-1).tolist())
        headers = (read_header(self.folder / shard, self.key).metadata for shard in self._shards)
        pairs = (pair for of in headers for pair in zip(json.loads(of["keys"]), json.loads(of["names"])))
        return [name for key, name in pairs if key.encode() not in wanted]

    def _flush(self) -> None:
        """Write the waiting records as a shard."""
        if not self._waiting:
            return
        names, records = zip(*self._waiting.values())
        tensors = {part: torch.stack([record[part] for record in records]) for part in records[0]}
        lists = {"keys": list(self._waiting), "names": names, "sums": [_checksum(record) for record in records]}
        metadata = {name: json.dumps(values) for name, values in lists.items()}
        file = self.folder / f"{record_key(lists['keys'])}.safetensors"
        with output_errors(self.key, file):
            write_atomically(file, lambda temporary: write_tensors(temporary, tensors, metadata))
        self._written.append(file.name)
        self._waiting = {}

    def _read_index(self, trusted: Iterable[str]) -> tuple[list[str], np.ndarray]:
        """Return the names and the index of the folder's shards; rank 0 checks those that nobody has checked yet."""

        def read() -> tuple[list[str], np.ndarray]:
            names, rows = [], []
            for name, *of in self._check_shards(set(trusted)):
                rows += [(key.encode(), len(names), place, value) for place, (key, value) in enumerate(zip(*of))]
                names.append(name)
            return names, np.sort(np.array(rows, dtype=_INDEX), order="key")

        return distributed.rank_zero_call(read)

    def _check_shards(self, trusted: set[str]) -> Iterator[tuple[str, list[str], list[int]]]:
        """Yield the name, keys and checksums of each whole shard; set damaged ones aside."""
        checked_file = self.folder / "checked.json"
        try:
            checked = dict(read_json(checked_file))
        except (OSError, ValueError, TypeError):
            checked = {}
        versions = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            status = path.stat()
            version = [status.st_size, status.st_mtime_ns]
            try:
                found = _read_shard(
                    path, self.key, check=path.name not in trusted and checked.get(path.name) != version
                )
            except (UserError, ValueError, KeyError) as error:
                why = "is of another version" if isinstance(error, KeyError) else f"is damaged ({error})"
                with output_errors(self.key, path):
                    set_aside(path, why)
                continue
            versions[path.name] = version
            yield path.name, *found
        if versions != checked:
            with ignore_write_errors(checked_file):
                write_json(checked_file, versions)
        for path in self.folder.glob(".*.tmp"):  # of a killed process; a young one may be another job's
            if time.time() - path.stat().st_mtime > _ABANDONED_SEC:
                path.unlink(missing_ok=True)


def _read_shard(path: Path, key: str, *, check: bool) -> tuple[list[str], list[int]]:
    """Return a shard's keys and checksums.

    Raises UserError or ValueError where it is damaged, KeyError where it is of another version.
    """
    metadata = read_header(path, key).metadata
    keys, checksums = json.loads(metadata["keys"]), json.loads(metadata["sums"])
    if check:
        tensors = read_tensors(path, key)
        found = [_checksum(dict(zip(tensors, parts))) for parts in zip(*tensors.values())]
        if found != checksums or len(keys) != len(checksums):
            raise ValueError("its records do not match their checksums")
    return keys, checksums


def _shapes(record: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in record.items()}


def _checksum(record: Mapping[str, Tensor]) -> int:
    """Return the sum of the words of a record's tensors, modulo 2**64."""
    parts = (tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in record.values())
    return sum(map(sum_words, parts)) % 2**64
