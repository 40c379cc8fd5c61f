"""Files that are complete or absent: atomic writes, hashes, canonical JSON."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from utils.errors import DiskFull, UserError, reason_of
from utils.record.logging import log

T = TypeVar("T")
Json = dict[str, Any]  # a JSON object, or other values by name
Values = Mapping[str, Any]  # such values, to read
ANOTHER_PATH = "make room there, or name another path"
_SHOWN_CHARACTERS = 200  # of a library's error
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp", re.DOTALL)  # of write_atomically


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], T], *, flush: bool = True) -> T:
    """Let `write` fill a temporary file, then move it to `path`. Return the result of `write`.

    A reader sees the old file or the new one, never a part; its mode stays. flush: write to the disk before the move;
    False for many small files, which a power failure may then lose.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        result = write(temporary)
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        if flush:
            fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if flush:
        fsync_path(path.parent)
    return result


def remove_temporary(folders: Iterable[Path], name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in folders. name: of this file alone.

    Only for a process that holds the lock of these files.
    """
    for folder in folders:
        for entry in folder.iterdir() if folder.is_dir() else ():
            if (match := _TEMPORARY.fullmatch(entry.name)) and name in (None, match[1]):
                entry.unlink()


def links_out(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the links in a folder that lead out of it, and their targets."""
    inside = folder.resolve()
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink() and not (target := entry.resolve()).is_relative_to(inside):
            yield entry, target


def refuse_links_out(key: str, folder: Path) -> None:
    """Raise UserError (`key`) for a link in a folder that leads out of it: writing would change files elsewhere."""
    for entry, target in links_out(folder):
        if not target.is_char_device():
            raise UserError(f"{key}: {entry} is a link out of the folder, to {target}; remove it, or name another")


@contextmanager
def output_errors(key: str, path: Path, advice: str = ANOTHER_PATH) -> Iterator[None]:
    """Turn a write error into a UserError (DiskFull for lack of room) that names the key and the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kind = DiskFull if any(os.strerror(number) in str(reason) for number in _FULL) else UserError
        raise kind(f"{key}: {path} cannot be written ({reason}); {advice}") from None


@contextmanager
def readable(path: Path, kind: str, advice: str = "get it again, or name another") -> Iterator[None]:
    """Turn any error of a library that reads a file, or checks its content, into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise errors of many classes
        reason = reason_of(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ".".join(map(str, first["loc"])) + ": " + first["msg"].removeprefix("Value error, ")
            reason = reason.removeprefix(": ")
        reason = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in reason[:_SHOWN_CHARACTERS])
        raise UserError(f"{path} is not a readable {kind} file ({reason}); {advice}") from None


@contextmanager
def ignore_write_errors(path: Path) -> Iterator[None]:
    """Turn a write error into a warning, for a file that will be rewritten soon."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be written (%s); it will be rewritten when it is next due", path, error)


_held: set[IO[str]] = set()


def _close_locks() -> None:
    """Close the locks in a forked loader worker, which may outlive its killed rank."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def file_lock(path: Path, refusal: str, patience_sec: float = 0.0) -> Iterator[None]:
    """Hold a lock file; raise UserError (`refusal`) if another process keeps it. The lock ends with the process.

    Only the process that holds the lock may remove the file.
    """
    until = time.monotonic() + patience_sec
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = open(path, "a")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            if time.monotonic() >= until:
                raise UserError(refusal) from None
            time.sleep(0.1)
            continue
        except OSError as error:  # for example Lustre, mounted without flock
            log.warning("%s cannot be locked (%s): two processes would not notice each other", path, error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                break
        stream.close()  # the last holder has removed the file
    with stream:
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock file."""
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, or no locks
        return False
    return False


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links. Atomic."""

    def fill(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(target, fill)


class AppendFile:
    """Append text to a file. Text that cannot be written is kept for the next write; `sync` raises the error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._pending = bytearray()
        self._warned = False
        self._lock = threading.RLock()  # a checkpoint's thread calls sync; a warning may call write again

    def write(self, text: str) -> None:
        """Append a text. Only the first write error is logged."""
        with self._lock:
            self._pending += text.encode()
            try:
                self._push()
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    log.warning("%s cannot be written (%s); its lines are kept in memory", self._path, error.strerror)

    def _push(self) -> None:
        while self._pending:
            del self._pending[: self._file.write(self._pending)]

    def sync(self) -> None:
        """Write everything to the disk. Raises OSError."""
        with self._lock:
            self._push()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Text that still cannot be written is lost, with a warning."""
        self.write("")
        if self._pending:
            log.warning("%s lacks its last %d bytes, which could not be written", self._path, len(self._pending))
        self._file.close()


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; NaN is allowed. Raises OSError, or ValueError if it is no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_beside(file: str, name: str) -> Any:
    """Return the values of a YAML file of ours that lies beside a module's file."""
    return yaml.safe_load(Path(file).with_name(name).read_text("utf-8"))


def canonical_json(value: Any) -> str:
    """Return canonical JSON for hashing: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
