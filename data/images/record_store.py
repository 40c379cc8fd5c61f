"""Checked records by key in a folder, a file each: the cache of images on disk, of latents and of texts.

    store = Store(Path("outputs/cache/latents"))
    store.put(key, content); store.get(key)        bytes; None where there are none, or damaged ones

A file is written under another name and moved into place. So processes and jobs share a folder without knowing each
other, and one that is killed loses what it was writing and nothing else. A record is a checksum and the content; one
that does not match is removed, as if it had never been there.
"""

import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from data.stream.source import Record
from utils.errors import UserError
from utils.io.files import canonical_json, output_errors, sha256_text, write_atomically
from utils.ranks import distributed

_SUM_BYTES = 8  # of a checksum, which leaves the content where its words are aligned
_FULL = 0.9  # of the limit: the oldest records go until no more is left


def record_key(*parts: Any) -> str:
    """Return the key of what a record was made from, JSON values: 32 hexadecimal digits."""
    return sha256_text(canonical_json(parts))[:32]


class Store:
    """The records of a folder. Keys begin with two hexadecimal digits, the name of a subfolder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def files(self) -> list[Path]:
        """Return the files of all records, each named by its key."""
        return list(self.folder.glob("[0-9a-f][0-9a-f]/[!.]*"))

    def has(self, key: str) -> bool:
        """Return whether there is a record, without reading it."""
        return self._file(key).exists()

    def get(self, key: str) -> np.ndarray | None:
        """Return a record's content, uint8 [N]; None where there is none, or a damaged one, which is removed."""
        try:
            record = np.fromfile(self._file(key), np.uint8)
        except OSError:
            return None
        content = record[_SUM_BYTES:]
        if _checksum(content) == record[:_SUM_BYTES].tobytes():
            return content
        with suppress(OSError):
            self._file(key).unlink()
        return None

    def put(self, key: str, content: bytes) -> None:
        """Write a record. Raises OSError."""
        record = _checksum(np.frombuffer(content, np.uint8)) + content
        write_atomically(self._file(key), lambda temporary: temporary.write_bytes(record), flush=False)


def _checksum(content: np.ndarray) -> bytes:
    """Return the sum of words, a quarter of the time of a CRC-32; not 0 where the content is, as after a power cut."""
    words = len(content) // 8 * 8
    rest = int.from_bytes(content[words:].tobytes(), "little")
    total = int(np.add.reduce(content[:words].view(np.uint64))) + rest
    return ((total + 1) % 2**64).to_bytes(_SUM_BYTES, "little")


class LimitedStore(Store):
    """A store of at most `limit_bytes`, in which the records that were written first make room for new ones.

    Raises UserError (`data.cache.folder`) where the folder cannot be used.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        super().__init__(folder)
        self._limit, self._used = limit_bytes, folder / "used"  # a file with the bytes of all records
        with output_errors("data.cache.folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._take(0)

    def used_bytes(self) -> int:
        """Return the bytes of all records."""
        return int(self._used.read_text() or 0)

    def add(self, key: str, content: bytes) -> int:
        """Write a record; return how many had to make room for it. Raises OSError."""
        if (size := _SUM_BYTES + len(content)) > _FULL * self._limit:
            return 0
        removed = self._take(size)
        self.put(key, content)
        return removed

    def _take(self, size: int) -> int:
        """Count bytes that will be written, after removing the oldest records where they have no room."""
        with open(self._used, "a+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # the system takes it from a process that is killed
            file.seek(0)
            text, removed = file.read(), 0
            used = int(text) if text.isdigit() else sum(record.stat().st_size for record in self.files())
            if used + size > self._limit:
                used, removed = self._evict(_FULL * self._limit - size)
            file.truncate(0)
            file.write(b"%d" % (used + size))
        return removed

    def _evict(self, room: float) -> tuple[int, int]:
        """Remove the oldest records until the others fit; return the bytes of these, and how many were removed."""
        found = sorted((status.st_mtime_ns, status.st_size, file) for file in self.files() if (status := file.stat()))
        used, removed = sum(size for _, size, _ in found), 0
        for _, size, file in found:
            if used <= room:
                break
            file.unlink(missing_ok=True)
            used, removed = used - size, removed + 1
        return used, removed


class TensorStore:
    """Records of tensors in a store. key: the configuration key that names the folder."""

    def __init__(self, folder: Path, key: str) -> None:
        self._store, self.key = Store(folder), key

    def keys(self) -> np.ndarray:
        """Return all keys, bytes [N]."""
        return np.array([file.name for file in self._store.files()], dtype=np.bytes_)

    def read(self, key: str) -> Record | None:
        """Return a record; None where there is none, or a damaged one."""
        content = self._store.get(key)
        return None if content is None else load(content.tobytes())

    def put(self, key: str, name: str, record: Mapping[str, Tensor]) -> None:
        """Write a record; name: what it is of. Raises UserError where a value is not finite or the disk is full."""
        record = {part: tensor.detach().cpu().contiguous() for part, tensor in record.items()}
        if not all(tensor.isfinite().all() for tensor in record.values()):
            raise UserError(
                f"{self.key}: {name} gives values that are not finite (NaN, infinite), which are not cached; encode in "
                "float32 or bfloat16, or with weights that are made for float16"
            )
        with output_errors(self.key, self._store.folder):
            self._store.put(key, save(record))

    def finish(self) -> None:
        """Wait until all ranks have written, and the disk holds it."""
        os.sync()
        distributed.barrier()
