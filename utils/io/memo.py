"""Cache values computed from files until the files change.

    hashes = measure_once(paths, lambda missing: map(sha256_file, missing), store, "hashing")
    target = cache / f"{files_key([file], fraction)}.arrow"      written if it is missing

A file is unchanged if its size, mtime, ctime and inode are. The system sets ctime at every change, and programs cannot
set it. A file that was changed just now may change again within a tick of the clock, so it counts as changed.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.io.files import AppendFile, canonical_json, ignore_write_errors, sha256_file, sha256_text
from utils.record.logging import log
from utils.record.progress import track

OURS = Path("outputs/cache")  # of all caches that no key names
_THREADS = 8
_SUBMITTED = 10_000
_YOUNG_SEC = 2  # the tick of the coarsest file system


def own_cache(path: Path) -> Path:
    """Return a path in outputs/cache, or the same path in the user's own cache folder if this user may not write there.

    A clone may be another user's, or read-only. Other paths, which a user has named, are returned as they are.
    """
    if not path.is_relative_to(OURS) or _may_write(path):
        return path
    return _find_own() / path.relative_to(OURS)


def _may_write(path: Path) -> bool:
    """Return whether the user may write a file or a folder, or make it."""
    path = path.absolute()
    return os.access(next(filter(os.path.exists, (path, *path.parents))), os.W_OK, effective_ids=True)


@functools.cache
def _find_own() -> Path:
    """Return the user's cache folder (XDG), else one in the folder for temporary files; say so."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "atelier")
    own = home if _may_write(home) else Path(tempfile.gettempdir(), f"atelier-{os.geteuid()}")
    log.info("%s is not writable for this user; caches are in %s (XDG_CACHE_HOME names another folder)", OURS, own)
    return own


def file_version(path: str | os.PathLike[str]) -> list[int] | None:
    """Return a file's size, mtime, ctime and inode; None if there is no file, or if it was changed just now."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if time.time_ns() - status.st_ctime_ns < _YOUNG_SEC * 10**9:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def files_key(paths: Iterable[Path], *parts: Any) -> str:
    """Return 32 hexadecimal digits that identify the current files and some JSON values: a name in a cache."""
    versions = [[os.path.realpath(path), file_version(path) or time.time_ns()] for path in paths]
    return sha256_text(canonical_json([versions, *parts]))[:32]


def measure_once(
    paths: Sequence[Path],
    measure: Callable[[list[Path]], Iterable[Any]],
    store: Path,
    what: str,
    is_kept: Callable[[Any], bool] = lambda value: value is not None,
) -> list[Any]:
    """Return a JSON value for each file; `measure` yields the values of new and changed files in order.

    store: the cache, a file of lines. A killed process loses at most one value. If `measure` changes, change this name.
    what: text for the progress bar. is_kept: whether to cache a value.
    """
    store = own_cache(store)
    names = {path: os.path.abspath(path) for path in paths}
    versions = {path: file_version(path) for path in names}  # before the files are read
    known = _read(store)
    values = {path: known[name][1] for path, name in names.items() if known.get(name, (0,))[0] == versions[path]}
    waiting = [path for path in names if path not in values]
    lines = None
    if waiting:
        with ignore_write_errors(store):
            store.parent.mkdir(parents=True, exist_ok=True)
            lines = AppendFile(store)
            lines.write("\n")  # the last line may be incomplete
    for path, value in track(zip(waiting, measure(waiting)), len(waiting), what):
        values[path] = value
        if lines is not None and versions[path] is not None and is_kept(value):
            lines.write(json.dumps([names[path], versions[path], value]) + "\n")
    if lines is not None:
        lines.close()
    return [values[path] for path in paths]


def _read(store: Path) -> dict[str, tuple[list[int], Any]]:
    """Return {file: (version, value)}."""
    known = {}
    for line in store.read_text(encoding="utf-8", errors="replace").split("\n") if store.is_file() else ():
        with suppress(ValueError, TypeError, RecursionError):  # an incomplete or damaged line
            name, version, value = json.loads(line)
            known[name] = version, value
    return known


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield `function(item)` in order, from threads, for functions that wait for files."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(items), _SUBMITTED):
            yield from pool.map(function, items[start : start + _SUBMITTED])


def hash_once(path: Path, store: Path) -> str:
    """Return the SHA-256 of a file, cached in `store`."""
    return measure_once([path], lambda missing: map(sha256_file, missing), store, "hashing")[0]
