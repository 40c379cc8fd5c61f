"""A copy of a run folder in a store that fsspec can write, such as s3://bucket/folder, for a machine that may be lost.

The copy has the names of the run folder. The checksum of a checkpoint is copied last, after all that the same command
needs to continue, so a machine that is lost at any moment leaves the checkpoints before. Credentials and endpoints come
from the environment and fsspec's configuration.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.dirfs import DirFileSystem

from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

_MARK = "state.sha256"  # of a whole checkpoint
_MARKS = "checkpoints/*/state.sha256"


class Mirror:
    """The copy of a run folder below a URL (`loop.checkpoint_mirror`); None: there is no copy. For rank 0.

    checkpoint: the newest one whose copy was begun.
    """

    def __init__(self, url: str | None, run: Path) -> None:
        self.checkpoint = Path()
        self._url = url
        self._run = run
        self._thread = ThreadPoolExecutor(1, "checkpoint mirror")
        self._copied: Future[None] = Future()
        self._copied.set_result(None)
        self._versions: set[tuple[Path, int]] = set()  # of copied files

    def copy(self, *, last: bool) -> None:
        """Copy the folder with its newest checkpoint in the background, unless a copy is still being made.

        A copy that fails is a warning, at the next one. last: wait for the copy before, and for this one.
        """
        if self._url is None or not (last or self._copied.done()):
            return
        self._report()
        self.checkpoint = (self._run / _newest(_open(self._run))).parent
        self._copied = self._thread.submit(self._copy)
        if last:
            self._report()

    def _report(self) -> None:
        if error := self._copied.exception():
            log.warning("loop.checkpoint_mirror: %s is not copied: %r", self.checkpoint, error)

    def _copy(self) -> None:
        mirror = _open(f"{self._url}/{self._run}")
        folder = self.checkpoint.parent
        files = [path for path in self._run.rglob("[!.]*") if path.is_file() and folder not in path.parents]
        for path in files + sorted(self.checkpoint.iterdir(), key=lambda path: path.name == _MARK):
            version = (path, path.stat().st_mtime_ns)
            if version not in self._versions:
                mirror.put_file(str(path), str(path.relative_to(self._run)))
                self._versions.add(version)
        for name in mirror.find(folder.name):
            if not (self._run / name).exists():
                mirror.rm_file(name)

    def fetch(self) -> None:
        """Fetch the copy if it has a newer checkpoint than the run folder.

        Raises UserError (`loop.checkpoint_mirror`) if the store fails and the folder has no checkpoint, because a run
        must not silently start again from step 0.
        """
        here = _newest(_open(self._run))
        try:
            mirror = _open(f"{self._url}/{self._run}")
            mirror.pipe_file(".mirror", b"")  # an error if the bucket is absent or cannot be written
            if _newest(mirror) > here:
                self._get(mirror)
        except Exception as error:  # each store raises other errors
            reason = f"loop.checkpoint_mirror: {self._url} fails: {error!r}"
            if not here:
                advice = "check URL, network and credentials (s3:// needs `make install-cloud`), or set it to null"
                raise UserError(f"{reason}; {advice}") from error
            log.warning("%s; the run goes on from its folder", reason)

    def _get(self, mirror: DirFileSystem) -> None:
        """Fetch all but checkpoints that are not whole. What makes them whole comes last."""
        marks = mirror.glob(_MARKS)
        whole = tuple(mark.removesuffix(_MARK) for mark in marks)
        torn = [name for name in mirror.find("checkpoints") if not name.startswith(whole)]
        for part in (set(mirror.find("")).difference(torn, marks), marks):
            mirror.get([*part], [str(self._run / name) for name in part])


def _open(place: Path | str) -> DirFileSystem:
    files, root = url_to_fs(place, use_listings_cache=False)
    return DirFileSystem(root, files)


def _newest(files: DirFileSystem) -> str:
    """Return the mark of the newest whole checkpoint in a run folder or its copy; "" if there is none."""
    return max(files.glob(_MARKS), default="")
