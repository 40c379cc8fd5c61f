"""A copy of a run folder in a store that fsspec can write, such as s3://bucket/folder, for a machine that may be lost.

Files have the same names in the copy as in the run folder. The checksum of a checkpoint is copied last, after all files
that the same command needs to continue. A machine that is lost at any moment leaves a copy with the earlier
checkpoints. The machine that began the run last owns the copy: the run of an earlier machine ends at its next save.
Credentials and endpoints come from the environment and fsspec's configuration.
"""

import json
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.utils import get_protocol

from utils.errors import UserError
from utils.io.files import Values, output_errors
from utils.record.logging import log
from utils.record.run_folder import locked

_KEY = "loop.checkpoint_mirror"
_MARK = "state.sha256"  # the last file of a whole checkpoint
_WHOLE = re.compile(rf"checkpoints/[^/.][^/]*/{re.escape(_MARK)}")
_OWNER = ".owner"  # names the run folder and its host


class RemoteCopy:
    """The copy of a run folder below a URL (`loop.checkpoint_mirror`). Rank 0 uses it.

    checkpoint: the newest checkpoint whose copy has begun.
    """

    def __init__(self, url: str, run: Path) -> None:
        self.checkpoint = Path()
        self._url = url
        self._run = run
        self._owner = f"{run.absolute()} on {socket.gethostname()}"
        self._thread = ThreadPoolExecutor(1, "checkpoint mirror")
        self._copied = Future()
        self._copied.set_result(None)
        self._versions = set()  # of copied files

    def copy(self, *, last: bool) -> None:
        """Copy the folder with its newest checkpoint in the background, unless the thread is still copying.

        last: wait for the earlier copy and for this one. The next call warns of a copy that failed, or raises UserError
        (`loop.checkpoint_mirror`) if another process owns the copy.
        """
        if not (last or self._copied.done()):
            return
        self._report()
        self.checkpoint = (self._run / _newest(_names_in(self._run))).parent
        self._copied = self._thread.submit(self._copy)
        if last:
            self._report()

    def _report(self) -> None:
        error = self._copied.exception()
        if isinstance(error, UserError):
            raise error
        if error is not None:
            log.warning("%s: %s is not copied: %r", _KEY, self.checkpoint, error)

    def _copy(self) -> None:
        store = self._open()
        owner = store.cat_file(_OWNER).decode() if store.exists(_OWNER) else self._owner
        if owner != self._owner:
            raise UserError(
                f"{_KEY}: the copy of {self._run} in {self._url} is now of {owner}; this run ends, and its checkpoints "
                "stay in its run folder; give another run_dir"
            )
        for name in _in_order(_names_in(self._run), [f"checkpoints/{self.checkpoint.name}/"]):
            version = (name, (self._run / name).stat().st_mtime_ns)
            if version not in self._versions:
                store.put_file(str(self._run / name), name)
                self._versions.add(version)
        for name in store.find("checkpoints"):
            if not (self._run / name).exists():
                store.rm_file(name)

    def fetch(self, check: Callable[[Values, str], None]) -> None:
        """Own the copy, and fetch it if it has a newer checkpoint than the run folder.

        check: raises UserError if the copy, by its configuration and its place, is a copy of another run; it is called
        before a byte is written. Raises UserError (`loop.checkpoint_mirror`) if the store fails and the folder
        has no checkpoint, because a run must not silently start again from step 0; or (`run_dir`) if another process
        uses the folder.
        """
        with output_errors("run_dir", self._run), locked(self._run):
            here = _newest(_names_in(self._run))
            try:
                store = self._open()
                names = store.find("")
                newest = _newest(names)
                if newest:
                    state = json.loads(store.cat_file(newest.replace(_MARK, "state.json")))
                    check(state["config"], f"{self._url}/{_name_of(self._run)}")
                store.pipe_file(_OWNER, self._owner.encode())  # an error if the bucket is absent or cannot be written
                if newest > here:
                    whole = [name.removesuffix(_MARK) for name in names if _WHOLE.fullmatch(name)]
                    for name in _in_order(names, whole):
                        (self._run / name).parent.mkdir(parents=True, exist_ok=True)
                        store.get_file(name, str(self._run / name))
            except UserError:
                raise
            except Exception as error:  # each store raises other errors
                reason = f"{_KEY}: {self._url} fails: {error!r}"
                if not here:
                    advice = "check URL, network and credentials (s3:// needs `make install-cloud`), or set it to null"
                    raise UserError(f"{reason}; {advice}") from error
                log.warning("%s; the run goes on from its folder", reason)

    def _open(self) -> DirFileSystem:
        """Return the store at the copy. Raises UserError if the copy is, or lies in, the run folder."""
        is_local = get_protocol(self._url) in ("file", "local")
        files, root = url_to_fs(self._url, use_listings_cache=False, **({"auto_mkdir": True} if is_local else {}))
        place = f"{root}/{_name_of(self._run)}"
        if is_local and self._run.resolve() in (Path(place).resolve(), *Path(place).resolve().parents):
            raise UserError(f"{_KEY}: {self._url} is inside the run folder {self._run}; set a folder outside of it")
        return DirFileSystem(place, files)


def _name_of(run: Path) -> str:
    """Return the name of a run's copy in the store: the path, which is never a pattern or a chain of URLs."""
    return "/".join(part for part in run.parts if part not in ("/", ".."))


def _newest(names: Iterable[str]) -> str:
    """Return the mark of the newest whole checkpoint among the files of a run folder or a copy; "" if there is none."""
    return max(filter(_WHOLE.fullmatch, names), default="")


def _names_in(folder: Path) -> list[str]:
    """Return the paths of the files below a folder, relative to the folder."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _in_order(names: Iterable[str], checkpoints: Sequence[str]) -> list[str]:
    """Return the files to copy: the files outside of checkpoints, the files of some checkpoints, and their marks last.

    Hidden files and files in hidden folders are skipped.
    """
    visible = [name for name in names if not re.search(r"(^|/)\.", name)]
    outside = [name for name in visible if not name.startswith("checkpoints/")]
    inside = [name for name in visible if name.startswith(tuple(checkpoints))]
    return outside + sorted(inside, key=lambda name: name.endswith(_MARK))
