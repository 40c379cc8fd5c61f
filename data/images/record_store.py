"""Records with a checksum, one file per key in a folder: the disk caches of images, latents and texts.

    store = Store(Path("outputs/cache/latents"))
    store.put(key, content); store.get(key)        bytes; None if missing or damaged

Files are written atomically, so processes and jobs can share a folder, and a killed process only loses the record that
it was writing. A record is a checksum and the content; a record with a wrong checksum is removed.
"""

import fcntl
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from data.stream.source import Record
from utils.errors import UserError
from utils.io.files import canonical_json, output_errors, sha256_text, write_atomically
from utils.io.memo import own_cache
from utils.ranks import distributed

if TYPE_CHECKING:
    from torch import Tensor

_SUM_BYTES = 8  # size of the checksum; keeps the content aligned to words
USED = "used"  # a file that marks the folder of a store, and holds the total size of a limited one
DAY_SEC = 86_400
_is_record = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.\d+\.tmp").fullmatch  # or a temporary file of a killed process
_FULL = 0.9  # eviction removes the oldest records down to this share of the limit


def record_key(*parts: Any) -> str:
    """Return the key for the inputs of a record (JSON values): 32 hexadecimal digits."""
    return sha256_text(canonical_json(parts))[:32]


class Store:
    """The records of a folder. The first two hexadecimal digits of a key name the subfolder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = own_cache(folder)  # where this user writes; records in `folder` are read, too

    def _file(self, key: str) -> Path:
        file = self.folder / key[:2] / key
        return file if self.own == self.folder or file.exists() else self.own / key[:2] / key

    def files(self) -> list[Path]:
        """Return the files of all records; the file name is the key."""
        return [file for place in {self.folder, self.own} for file in place.glob("[0-9a-f][0-9a-f]/[!.]*")]

    def has(self, key: str) -> bool:
        """Return whether a record exists, without reading it."""
        return self._file(key).exists()

    def get(self, key: str) -> ndarray | None:
        """Return the content of a record, uint8 [N], or None; note the day of its use. A damaged record is removed."""
        file = self._file(key)
        try:
            record = np.fromfile(file, np.uint8)
        except OSError:
            return None
        content = record[_SUM_BYTES:]
        is_whole = _checksum(content) == record[:_SUM_BYTES].tobytes()
        with suppress(OSError):  # a read-only disk
            if not is_whole:
                file.unlink()
            elif time.time() - file.stat().st_mtime > DAY_SEC:
                os.utime(file)
        return content if is_whole else None

    def put(self, key: str, content: bytes) -> None:
        """Write a record. Raises OSError."""
        record = _checksum(np.frombuffer(content, np.uint8)) + content
        write_atomically(self.own / key[:2] / key, lambda temporary: temporary.write_bytes(record), flush=False)

    def unused(self, since: float) -> list[Path]:
        """Return the old records that nothing has read since then; none in a folder without the mark of a store.

        A folder of a user may have names of two digits, too.
        """
        records = self.folder.glob("[0-9a-f][0-9a-f]/*") if (self.folder / USED).exists() else ()
        return [file for file in records if _is_record(file.name) and file.stat().st_mtime < since]


def _checksum(content: ndarray) -> bytes:
    """Return the sum of words plus 1, four times as fast as CRC-32. It detects files of zeros after a power cut."""
    words = len(content) // 8 * 8
    rest = int.from_bytes(content[words:].tobytes(), "little")
    total = int(np.add.reduce(content[:words].view(np.uint64))) + rest
    return ((total + 1) % 2**64).to_bytes(_SUM_BYTES, "little")


class LimitedStore(Store):
    """A store of at most `limit_bytes`; the oldest records are evicted. On a read-only disk its records are read.

    Raises UserError (`data.cache.folder`) if there is no such folder, and it cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        super().__init__(own_cache(folder))
        self._limit = limit_bytes
        self._used = self.folder / USED
        with output_errors("data.cache.folder", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a read-only disk; a record that must be written raises it again
            self._take(0)

    def used_bytes(self) -> int:
        """Return the total size of all records; 0 for a folder that could never be written."""
        return int(self._used.read_text() or 0) if self._used.exists() else 0

    def add(self, key: str, content: bytes) -> None:
        """Write a record, unless it would take nearly the whole store. Raises UserError (`data.cache.folder`)."""
        if (size := _SUM_BYTES + len(content)) <= _FULL * self._limit:
            with output_errors("data.cache.folder", self.folder):
                self._take(size)
                self.put(key, content)

    def _take(self, size: int) -> None:
        """Reserve `size` bytes, evicting the oldest records if needed."""
        with open(self._used, "a+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # the system releases it when a process is killed
            file.seek(0)
            text = file.read()
            used = int(text) if text.isdigit() else sum(record.stat().st_size for record in self.files())
            if used + size > self._limit:
                used = self._evict(_FULL * self._limit - size)
            file.truncate(0)
            file.write(b"%d" % (used + size))

    def _evict(self, room: float) -> int:
        """Remove the oldest records until the others fit into `room`; return their size."""
        oldest = sorted((status.st_mtime_ns, status.st_size, file) for file in self.files() if (status := file.stat()))
        used = sum(size for _, size, _ in oldest)
        for _, size, file in oldest:
            if used <= room:
                break
            file.unlink(missing_ok=True)
            used -= size
        return used


class TensorStore:
    """Records of tensors in a store; config_key: names the folder in messages."""

    def __init__(self, folder: Path, config_key: str) -> None:
        self._store = Store(folder)
        self.config_key = config_key

    def is_missing(self, keys: ndarray) -> ndarray:
        """Return which keys have no record, bool, in the shape of `keys`; the same on all ranks."""

        def find() -> ndarray:
            existing = np.array([file.name for file in self._store.files()], np.bytes_)
            return ~np.isin(keys.astype(np.bytes_), existing)

        return distributed.rank_zero_call(find)

    def read(self, key: str) -> Record | None:
        """Return a record, or None if it is missing or damaged."""
        from safetensors.torch import load

        content = self._store.get(key)
        return None if content is None else load(content.tobytes())

    def put(self, key: str, name: str, record: Mapping[str, "Tensor"]) -> None:
        """Write a record; name: for messages. Raises UserError if a value is not finite or the disk is full."""
        from safetensors.torch import save

        record = {part: tensor.detach().cpu().contiguous() for part, tensor in record.items()}
        if not all(tensor.isfinite().all() for tensor in record.values()):
            raise UserError(
                f"{self.config_key}: {name} gives NaN or infinite values, which are not cached; encode in "
                "float32 or bfloat16, or use weights made for float16"
            )
        with output_errors(self.config_key, self._store.own):
            self._store.put(key, save(record))

    def finish(self) -> None:
        """Mark the folder as a store's, flush to disk and wait for all ranks."""
        with suppress(OSError):  # no record, or a read-only disk
            (self._store.own / USED).touch()
        os.sync()
        distributed.barrier()
