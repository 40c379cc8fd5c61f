"""The watchdog: if a rank dies or hangs, end the job with a message that names the rank.

A thread of each rank publishes a sign of life and its progress in the process group's key-value store. Rank 0 watches
all ranks, and all watch rank 0: the store serves 2N reads per round, not N x N. A rank without signs of life is dead
or stopped. A rank hangs if its progress stays behind.
"""

import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from utils.errors import EXIT_LOST_RANK
from utils.ranks import distributed
from utils.ranks.signals import is_stop_requested
from utils.record.logging import log

# Intervals without an answer from the store. A signal may end the launcher, which owns the store, before this rank's
# main thread returns from a call and handles the same signal.
_STORE_PATIENCE = 3
_LAST_WORDS_SEC = 5.0


class Watchdog:
    """Watch the ranks of a job from a thread; without a process group, only the progress of this process."""

    def __init__(self, timeout_sec: float) -> None:
        self.timeout_sec = timeout_sec
        self.interval_sec = min(5.0, timeout_sec / 8)
        self._rounds = 0
        self._progress = 0
        self._phase = "starting"
        self._stop = threading.Event()
        self._thread = None
        self._store = None  # None for one rank
        self._rank = 0
        self._size = 1
        # {(rounds or progress, rank): (the last value, when it changed)}
        self._last = {}

    def start(self) -> None:
        """Start watching. All ranks call it together."""
        if distributed.is_distributed():
            self._rank = distributed.rank()
            self._size = distributed.world_size()
            # A separate client, so that the process group's is never blocked.
            self._store = dist.PrefixStore("atelier/watchdog", dist.distributed_c10d._get_default_store().clone())
            self._store.set_timeout(timedelta(seconds=self.timeout_sec))
            self._store.set(str(self._rank), self._state())
            distributed.barrier()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, phase: str) -> None:
        """Record what the main thread does next (`step 12: loading`). Each call counts as progress; cheap."""
        self._phase = phase
        self._progress += 1

    def stop(self) -> None:
        """Stop watching. All ranks call it together, so that a rank that exits early does not count as dead."""
        if self._thread is None:
            return
        distributed.barrier()
        self._stop.set()
        self._thread.join()
        self._thread = None
        distributed.barrier()

    def abandon(self) -> None:
        """Stop this rank's thread alone, after an error; the other ranks will notice."""
        self._stop.set()

    def name_lost_ranks(self) -> str | None:
        """After a failed collective, return which ranks show no sign of life for two rounds; None if unknown.

        Takes up to three intervals, in which the surviving ranks continue to publish.
        """
        if self._thread is None or self._store is None:
            return None
        others = [str(other) for other in range(self._size) if other != self._rank]
        try:
            before = self._store.multi_get(others)
            time.sleep(2.5 * self.interval_sec)
            now = self._store.multi_get(others)
            gone = [other for other, *states in zip(others, before, now) if len(set(states)) == 1]
        except Exception:  # rank 0, which owns the store, is gone
            gone = ["0"]
        return f"rank {', '.join(gone)} has died: no sign of life" if gone else None

    def _state(self) -> str:
        return f"{self._rounds}|{self._progress}|{self._phase}"

    def _exchange(self) -> dict[int, str]:
        """Publish this rank's state and return the states of the ranks that it watches."""
        self._rounds += 1
        if self._store is None:
            return {self._rank: self._state()}
        self._store.set(str(self._rank), self._state())
        return {rank: self._store.get(str(rank)).decode() for rank in (range(self._size) if self._rank == 0 else [0])}

    def _watch(self) -> None:
        clock = 0.0
        looked = answered = time.monotonic()
        while not self._stop.wait(self.interval_sec):
            now = time.monotonic()
            clock += min(now - looked, 2 * self.interval_sec)  # excludes the time for which this process was suspended
            looked = now
            verdict = None
            try:
                verdict = self._judge(self._exchange(), clock)
                answered = time.monotonic()
            except Exception as error:
                if is_stop_requested():  # the launcher may exit on the signal, with the store, while this rank saves
                    self._store = None
                elif time.monotonic() - answered >= _STORE_PATIENCE * self.interval_sec:
                    verdict = f"rank 0 is gone: its key-value store does not answer ({type(error).__name__})"
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)

    def _judge(self, seen: Mapping[int, str], now: float) -> str | None:
        """Return the verdict on the watched ranks, None if all are well."""
        progress = {}
        phases = {}
        for rank, text in seen.items():
            rounds, count, phases[rank] = text.split("|", 2)
            progress[rank] = int(count)
            silent = self._unchanged_sec("rounds", rank, rounds, now)
            if silent > self.timeout_sec:
                return f"rank {rank} has died or was stopped: no sign of life for {silent:.0f} s"
        idle = min([self._unchanged_sec("progress", rank, count, now) for rank, count in progress.items()])
        judges = self._rank == 0 or self._store is None
        if not judges or idle < self.timeout_sec:
            return None
        behind = [rank for rank, count in progress.items() if count == min(progress.values())]
        where = phases[behind[0]]
        return f"rank {', '.join(map(str, behind))} hangs in {where!r}: no progress for {self.timeout_sec:.0f} s"

    def _unchanged_sec(self, what: str, rank: int, value: str | int, now: float) -> float:
        """Return for how many seconds a rank has published the same value."""
        before, since = self._last.get((what, rank), (None, now))
        if value != before:
            self._last[what, rank] = value, now
            return 0.0
        return now - since

    def _end(self, verdict: str) -> None:
        threading.Timer(_LAST_WORDS_SEC, os._exit, [EXIT_LOST_RANK]).start()  # writing the log may hang, too
        log.error(
            "%s. Ending the job with status %d; the same command resumes from the last checkpoint "
            "(runtime.hang_timeout_sec=%g).", verdict, EXIT_LOST_RANK, self.timeout_sec,
        )  # fmt: skip
        os._exit(EXIT_LOST_RANK)  # threads of a hung process cannot be joined
