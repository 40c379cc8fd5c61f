"""The watchdog: when a rank dies or hangs, end the job with a message that names it.

Every rank's thread writes a sign of life and its progress to the key-value store that the ranks met at. Rank 0 watches
all, all watch rank 0 (so the store serves 2N reads a round, not N x N). A rank without signs of life is dead or
stopped; a rank whose progress stays behind the others' hangs.

    watchdog = Watchdog(timeout_sec=1800); watchdog.start()
    watchdog.progress("step 12: loading")     # by the main thread, cheap
    watchdog.stop()
"""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from utils import distributed
from utils.errors import EXIT_LOST_RANK
from utils.logging import get_logger

log = get_logger(__name__)


class Watchdog:
    """Watch the ranks of one job from a thread; without a process group it does nothing."""

    def __init__(self, timeout_sec: float) -> None:
        self.timeout_sec = timeout_sec
        self.interval_sec = min(5.0, timeout_sec / 8)
        self._progress, self._phase = 0, "starting"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # What was last seen of each rank, and when it last changed: rank -> (text, time).
        self._life: dict[int, tuple[str, float]] = {}
        self._moves: dict[int, tuple[int, float, str]] = {}

    def start(self) -> None:
        """Begin to watch. All ranks call it together."""
        if not distributed.is_distributed():
            return
        rank, size = distributed.rank(), distributed.world_size()
        # A client of its own: the process group's is not ours to block.
        self._store = dist.PrefixStore("atelier/watchdog", dist.distributed_c10d._get_default_store().clone())
        self._store.set_timeout(timedelta(seconds=self.timeout_sec))
        self._rank = rank
        self._watched = [other for other in range(size) if other != rank] if rank == 0 else [0]
        self._publish(0)
        distributed.barrier()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, phase: str) -> None:
        """Say what the main thread is about to do; each call counts as progress."""
        self._phase = phase
        self._progress += 1

    def stop(self) -> None:
        """End the watch. All ranks call it together, so that none takes an early leaver for dead."""
        if self._thread is None:
            return
        distributed.barrier()
        self._stop.set()
        self._thread.join()
        self._thread = None
        distributed.barrier()

    def abandon(self) -> None:
        """End this rank's watch alone, after an error; the others find it out."""
        self._stop.set()

    def name_lost_ranks(self) -> str | None:
        """Return which ranks gave no sign of life in two rounds, after a collective has failed; None when unknown.

        Takes up to three intervals: the survivors keep publishing meanwhile.
        """
        if self._thread is None:
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

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(self.interval_sec):
            count += 1
            try:
                self._publish(count)
                seen = {other: self._store.get(str(other)).decode() for other in self._watched}
                verdict = self._judge(seen, time.monotonic())
            except (
                Exception
            ) as error:  # the store lives in rank 0's process or its launcher: without it the job is over
                verdict = f"rank 0 is gone: its key-value store does not answer ({type(error).__name__})"
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)

    def _judge(self, seen: dict[int, str], now: float) -> str | None:
        """Return what is wrong with the watched ranks, if anything."""
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
        log.error(
            "%s. Ending the job with status %d; the same command resumes from the last checkpoint "
            "(runtime.hang_timeout_sec=%g).",
            verdict,
            EXIT_LOST_RANK,
            self.timeout_sec,
        )
        sys.stderr.flush()
        # Threads of a hung process cannot be joined: leave at once.
        os._exit(EXIT_LOST_RANK)
