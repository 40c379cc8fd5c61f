"""The watchdog: when a rank dies or hangs, the only one too, end the job with a message that names it.

Every rank's thread writes a sign of life and its progress to the key-value store of the process group. Rank 0 watches
all, all watch rank 0 (so the store serves 2N reads a round, not N x N). A rank without signs of life is dead or
stopped; a rank whose progress stays behind the others' hangs.

    watchdog = Watchdog(timeout_sec=1800); watchdog.start()
    watchdog.progress("step 12: loading")     # by the main thread, cheap
    watchdog.stop()
"""

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from utils.errors import EXIT_LOST_RANK
from utils.ranks import distributed
from utils.ranks.job_status import note_status
from utils.ranks.signals import stop_requested_sec
from utils.record.logging import get_logger

log = get_logger(__name__)

# Intervals without an answer of the store. A signal may end the launcher, whose store it is, before this rank's main
# thread comes out of the call that it is in and sees the same signal.
_STORE_PATIENCE = 3
_LAST_WORDS_SEC = 5.0


class Watchdog:
    """Watch the ranks of one job from a thread; without a process group, this process's own progress."""

    def __init__(self, timeout_sec: float) -> None:
        self.timeout_sec = timeout_sec
        self.interval_sec = min(5.0, timeout_sec / 8)
        self._progress, self._phase = 0, "starting"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None  # None: one rank
        self._rank = 0
        self._watched: list[int] = []
        # The last value of each rank, and when it changed: rank -> (value, time).
        self._life: dict[int, tuple[str, float]] = {}
        self._moves: dict[int, tuple[int, float, str]] = {}

    def start(self) -> None:
        """Begin to watch. All ranks call it together."""
        if distributed.is_distributed():
            rank, size = distributed.rank(), distributed.world_size()
            # A separate client, so that the process group's is never blocked.
            self._store = dist.PrefixStore("atelier/watchdog", dist.distributed_c10d._get_default_store().clone())
            self._store.set_timeout(timedelta(seconds=self.timeout_sec))
            self._rank = rank
            self._watched = [other for other in range(size) if other != rank] if rank == 0 else [0]
            self._publish(0)
            distributed.barrier()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, phase: str) -> None:
        """Record what the main thread does next; each call counts as progress."""
        self._phase = phase
        self._progress += 1

    def stop(self) -> None:
        """End the watch. All ranks call it together, so that a rank that leaves early does not count as dead."""
        if self._thread is None:
            return
        distributed.barrier()
        self._stop.set()
        self._thread.join()
        self._thread = None
        distributed.barrier()

    def abandon(self) -> None:
        """End this rank's watch alone, after an error; the other ranks notice it."""
        self._stop.set()

    def name_lost_ranks(self) -> str | None:
        """Return which ranks gave no sign of life in two rounds, after a collective has failed; None when unknown.

        Takes up to three intervals: the survivors keep publishing meanwhile.
        """
        if self._thread is None or self._store is None:
            return None
        others = [other for other in range(distributed.world_size()) if other != self._rank]
        try:
            before = {other: self._store.get(str(other)).split(b"|")[0] for other in others}
            time.sleep(2.5 * self.interval_sec)
            gone = [other for other in others if self._store.get(str(other)).split(b"|")[0] == before[other]]
        except Exception:  # the store went with its owner
            gone = [0]
        return f"rank {', '.join(map(str, gone))} has died: no sign of life" if gone else None

    def _publish(self, count: int) -> None:
        self._store.set(str(self._rank), f"{count}|{self._progress}|{self._phase}")

    def _exchange(self, count: int) -> dict[int, str]:
        """Publish this rank's state and return that of the watched ranks."""
        if self._store is None:
            return {}
        self._publish(count)
        return {other: self._store.get(str(other)).decode() for other in self._watched}

    def _watch(self) -> None:
        count, clock = 0, 0.0
        looked = answered = time.monotonic()
        while not self._stop.wait(self.interval_sec):
            count += 1
            now = time.monotonic()
            clock += min(now - looked, 2 * self.interval_sec)  # without the time for which this process was stopped
            looked = now
            try:
                seen = self._exchange(count)
                answered = time.monotonic()
                verdict = self._judge(seen, clock)
            except Exception as error:
                verdict = self._judge_silence(time.monotonic() - answered, error)
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)

    def _judge_silence(self, silent_sec: float, error: Exception) -> str | None:
        """Return the verdict where the store does not answer: it is in rank 0's process or its launcher.

        A launcher may leave on the signal that asks the ranks to stop: they need the time to save, and no store.
        """
        asked_sec = stop_requested_sec()
        if asked_sec is not None:
            # The store is not asked again meanwhile: torch shows each failure on 25 lines.
            self._stop.wait(max(0.0, self.timeout_sec - asked_sec))
        elif silent_sec < _STORE_PATIENCE * self.interval_sec:
            return None
        return f"rank 0 is gone: its key-value store does not answer ({type(error).__name__})"

    def _judge(self, seen: dict[int, str], now: float) -> str | None:
        """Return the verdict on the watched ranks, None where all are well."""
        own = self._moves.get(self._rank)
        if own is None or own[0] != self._progress:
            self._moves[self._rank] = (self._progress, now, self._phase)
        for other, text in seen.items():
            count, progress, phase = text.split("|", 2)
            if self._life.get(other, ("", 0.0))[0] != count:
                self._life[other] = (count, now)
            if self._moves.get(other, (-1, 0.0, ""))[0] != int(progress):
                self._moves[other] = (int(progress), now, phase)
        for other, (_, since) in self._life.items():
            if now - since > self.timeout_sec:
                return f"rank {other} has died or was stopped: no sign of life for {now - since:.0f} s"
        if self._rank != 0 or min(now - since for _, since, _ in self._moves.values()) < self.timeout_sec:
            return None
        least = min(progress for progress, _, _ in self._moves.values())
        behind = sorted(rank for rank, (progress, _, _) in self._moves.items() if progress == least)
        where = self._moves[behind[0]][2]
        return f"rank {', '.join(map(str, behind))} hangs in {where!r}: no progress for {self.timeout_sec:.0f} s"

    def _end(self, verdict: str) -> None:
        said = (
            "%s. Ending the job with status %d; the same command resumes from the last checkpoint "
            "(runtime.hang_timeout_sec=%g)."
        )
        # The disk that a rank hangs on may hold the log too.
        last_words = threading.Thread(
            target=log.error, args=(said, verdict, EXIT_LOST_RANK, self.timeout_sec), daemon=True
        )
        last_words.start()
        last_words.join(_LAST_WORDS_SEC)
        note_status(EXIT_LOST_RANK)
        # Threads of a hung process cannot be joined: leave at once.
        os._exit(EXIT_LOST_RANK)
