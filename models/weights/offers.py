"""Weights of timm that a command may fetch from the hub by itself, in a bounded time.

huggingface_hub bounds neither the lookup of a host's name, nor a slow answer, nor a whole download; it starts an
interrupted one anew, and compares no hash. So its questions are asked here in a thread, and the file is received here.
"""

import re
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from models.config import Pretrained
from models.weights.timm_hub import WEIGHTS, cached_file, cached_names
from utils.errors import UserError, reason_of
from utils.io.files import Json, file_lock, read_beside, sha256_file, write_text
from utils.io.safe_text import hide_secrets
from utils.record.logging import log
from utils.record.progress import Bar

_ANSWER_SEC = 2.0
_STALLED_SEC = 10.0
_MOST_SEC = 120.0  # of downloads: other ranks wait
_LINE = 12.5  # megabytes in a second
_LIKE = 0.6  # of the multiply-adds: the features of a collection choose from networks of about one size


NETWORKS = read_beside(__file__, "networks.yaml")  # it explains its columns


def list_weights(pretrained: Pretrained, most_cost: float, seconds: float) -> list[str]:
    """Return the networks of timm whose weights a command may use, which are in the cache: small files, then ViTs.

    "auto" fetches those of the costliest network up to `most_cost` whose file a line of 100 Mbit/s brings in time, and
    of others like it: the hub has two seconds to answer, and the downloads `seconds`, two minutes at most. A failure is
    a line in the log. Only one rank may call it.
    """
    if pretrained == "never":
        return []
    until = monotonic() + min(seconds, _MOST_SEC)
    fitting = {name: row for name, row in NETWORKS["weights"].items() if row["cost"] <= most_cost}
    least = 0.0
    for name, row in reversed(fitting.items()):
        is_cached = cached_file(name) is not None
        left = until - monotonic()
        if row["gmacs"] >= least and (is_cached or row["megabytes"] <= _LINE * left):
            least = least or _LIKE * row["gmacs"]
            if pretrained == "auto" and not is_cached:
                _fetch(name, row, left)
    return cached_names() + [name for name, row in fitting.items() if "build" in row and cached_file(name)]


def _fetch(name: str, row: Json, seconds: float) -> None:
    """Fetch the weights of a network, or say why not."""
    from huggingface_hub import constants

    what = f"the weights of timm's {name} ({row['megabytes']} MB, {row['licence']}) from {constants.ENDPOINT}"
    download = _Download(f"timm/{name}")
    download.start()
    if download.answered.wait(_ANSWER_SEC) and download.size:
        log.info(
            "fetching %s, for at most %.0f s; model.pretrained=cached or HF_HUB_OFFLINE=1 fetches none", what, seconds
        )
        until = monotonic() + seconds
        bar = Bar(f"fetching {name}", download.size)
        with bar.opened():
            while download.is_alive() and monotonic() < until:
                download.join(0.1)
                bar.advance(download.done)
    if download.is_alive():
        download.is_left = True
        got = f"{download.done:,} of {download.size:,} bytes came in {seconds:.0f} s; the next run continues"
        log.warning("%s are left: %s", what, got if download.size else f"no answer in {_ANSWER_SEC:.0f} s")
    elif download.error:
        log.warning("%s cannot be fetched (%s); the command continues without them", what, download.error)


class _Download(Thread):
    """Fetch the weight file of a repository on the hub into its cache, or continue to.

    answered: whether the hub has; size: then, of the file in bytes, 0 after an error. is_left: set it to stop. A lookup
    of a host's name cannot be stopped: it ends with its thread, which does nothing more.
    """

    def __init__(self, repository: str) -> None:
        super().__init__(daemon=True)
        self._repository = repository
        self.answered = Event()
        self.size = 0
        self.done = 0
        self.error = ""
        self.is_left = False

    def run(self) -> None:
        """Fetch; `error` is the reason if the file is not complete."""
        try:
            self._run()
        except Exception as error:  # the hub's own classes, the connection's and the disk's
            self.error = hide_secrets(reason_of(error))
        finally:
            self.answered.set()

    def _run(self) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(self._repository, WEIGHTS), timeout=_ANSWER_SEC)
        commit = found.commit_hash or ""
        digest = found.etag or ""
        if not (found.size and re.fullmatch("[0-9a-f]{40}", commit) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise UserError("the answer states no commit, size and SHA-256, as the hub's does")
        self.size = found.size
        self.answered.set()
        if self.is_left:
            return
        folder = Path(constants.HF_HUB_CACHE, f"models--{self._repository.replace('/', '--')}")
        part = folder / f"blobs/{digest}.incomplete"
        lock = part.with_suffix(".lock")
        with file_lock(lock, "another process fetches them"):
            try:
                self._receive(part, commit)
            except OSError:  # a full disk
                part.unlink(missing_ok=True)
                raise
            finally:
                lock.unlink()
            if not self.is_left:
                self._keep(part, digest, folder / "snapshots" / commit / WEIGHTS)
                write_text(folder / "refs/main", commit)

    def _receive(self, part: Path, commit: str) -> None:
        """Append what is missing to a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        url = hf_hub_url(self._repository, WEIGHTS, revision=commit)
        with open(part, "ab") as file:
            self.done = file.tell()
            if self.done >= self.size:
                return
            headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={self.done}-"}
            with get_session().stream("GET", url, headers=headers, timeout=_STALLED_SEC) as response:
                response.raise_for_status()
                if response.status_code != 206:  # the whole file comes
                    file.truncate(0)
                    self.done = 0
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    self.done += len(chunk)
                    if self.is_left:
                        return

    def _keep(self, part: Path, digest: str, path: Path) -> None:
        """Give a complete file its name. Raises UserError if it is another."""
        if self.done < self.size:
            raise UserError(f"{self.done:,} of {self.size:,} bytes came; the next run continues")
        if sha256_file(part) != digest:
            part.unlink()
            raise UserError("what came has another SHA-256 than the hub states, and is removed")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
