"""The checkpoint writer: a run's state is copied at once and written while training goes on.

One write is under way at most; the next one waits for it. The thread writes and nothing else: what it met is said and
raised by the main thread, so that a process forked meanwhile inherits no lock of the log's.
"""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

Groups = Mapping[str, Mapping[str, Tensor]]


class HostCopies:
    """Memory on the host that tensors are copied to; kept from one save to the next, pinned for those of a GPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def take(self, groups: Groups) -> tuple[dict[str, dict[str, Tensor]], torch.cuda.Event | None]:
        """Return contiguous copies, and the event after which those from a GPU are complete.

        Copies from a GPU are queued behind the work before them and ahead of the next step; nobody waits for them here.
        """
        copies: dict[str, dict[str, Tensor]] = {}
        on_gpu = False
        for group, tensors in groups.items():
            copies[group] = {}
            for name, tensor in tensors.items():
                copy = self._kept.get((group, name))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[group][name] = copy.copy_(tensor.detach(), non_blocking=True)
                on_gpu = on_gpu or tensor.is_cuda
        self._kept = {(group, name): copy for group, made in copies.items() for name, copy in made.items()}
        event = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        return copies, event


class CheckpointWriter:
    """Write one state after another, in the background or not; rank 0's alone is used.

    With `retries` a state that the disk refuses is a warning and the run goes on; without, `failed` says that it must
    end, and `finish` raises why.
    """

    def __init__(self, *, in_background: bool, retries: bool) -> None:
        self.in_background, self.retries = in_background, retries
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._said = ""

    @property
    def failed(self) -> bool:
        """Return whether the run must end for what the last write met; costs nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        self._forgive()
        return self._error is not None

    def submit(self, groups: Groups, write: Callable[[Groups], None], said: str, *, copied: bool) -> None:
        """Have `write` called with the groups as they are now; `said` is logged when that is done.

        `copied`: nobody else holds the groups' tensors, so they need no copying here.
        Does nothing where an earlier write has failed and the run is about to end.
        """
        self._join()
        self._forgive()
        if self._error is not None:
            return
        self._said = said
        if not self.in_background:
            self._run(groups, None, write)
            self._say()
            return
        copies, event = (groups, None) if copied else self._copies.take(groups)
        self._thread = threading.Thread(target=self._run, args=(copies, event, write), name="checkpoint writer")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the write under way. Raises what it met, even where the run would retry: no other save follows."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the write under way, and only say what it met: for a run that ends by another error."""
        self._join()
        if self._error is not None:
            log.error("%s", self._error)
            self._error = None

    def _run(self, groups: Groups, event: torch.cuda.Event | None, write: Callable[[Groups], None]) -> None:
        try:
            if event is not None:
                event.synchronize()
            write(groups)
        except Exception as error:  # raised by the main thread
            self._error = error

    def _join(self) -> None:
        """Wait for the write under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._say()

    def _say(self) -> None:
        if self._error is None:
            log.info("%s", self._said)

    def _forgive(self) -> None:
        """Where the run retries, make a warning of what the disk refused."""
        if self.retries and isinstance(self._error, UserError):
            log.error("%s\nThe run goes on and tries again at its next save (loop.on_failed_save=retry)", self._error)
            self._error = None
