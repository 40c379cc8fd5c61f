"""The checkpoint writer: a run's state is copied at once and written while training continues.

At most one write is running; the next one waits for it. The thread only writes: its errors are logged and raised in the
main thread, so that a process forked meanwhile inherits no lock of the logger.
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
    """Host memory that tensors are copied to; reused by the next save, and pinned for tensors of a GPU.

    Best weights and checkpoints are written in turn, and each keeps its memory.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def take(self, groups: Groups) -> tuple[dict[str, dict[str, Tensor]], torch.cuda.Event | None]:
        """Return contiguous copies, and the event after which copies from a GPU are complete.

        Copies from a GPU are queued before the next step; this call does not wait for them.
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
                self._kept[group, name] = copies[group][name]
        event = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        return copies, event


class CheckpointWriter:
    """Write one state after another, in the background or not; only rank 0 uses it.

    With `retries` a failed write is logged and the run continues. Without, `failed` is true, so that the run ends, and
    `finish` raises the error.
    """

    def __init__(self, *, in_background: bool, retries: bool) -> None:
        self.in_background, self.retries = in_background, retries
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._message = ""

    @property
    def failed(self) -> bool:
        """Whether the run must end because a write failed; cheap."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        self._log_and_forget()
        return self._error is not None

    def submit(self, groups: Groups, write: Callable[[Groups], None], message: str, *, copied: bool) -> None:
        """Call `write` with the groups as they are now, and log `message` when it is done.

        `copied`: nothing else holds the groups' tensors, so they need no copy here. Does nothing after a write that
        failed, because the run is about to end.
        """
        self._join()
        self._log_and_forget()
        if self._error is not None:
            return
        self._message = message
        if not self.in_background:
            self._run(groups, None, write)
            self._log_done()
            return
        copies, event = (groups, None) if copied else self._copies.take(groups)
        self._thread = threading.Thread(target=self._run, args=(copies, event, write), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the running write; its error stays for `failed`."""
        self._join()
        self._log_and_forget()

    def finish(self) -> None:
        """Wait for the running write. Raises its error, even where the run would retry: no other save follows."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the running write and only log its error: for a run that ends by another error."""
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
        """Wait for the running write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._log_done()

    def _log_done(self) -> None:
        if self._error is None:
            log.debug("%s", self._message)

    def _log_and_forget(self) -> None:
        """Where the run retries, log a failed write and forget it."""
        if self.retries and isinstance(self._error, UserError):
            log.error("%s\nThe run continues and tries again at its next save (loop.on_failed_save=retry)", self._error)
            self._error = None
