"""The loader and its two streams: from draws to batches on the device.

A worker reads the record of a sample from the source, creates the views of its image with the sample's key, and adds
the fields of the task. An unreadable sample becomes blank with weight 0 and is reported by name; it never stops a run.
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.collection.collection import Collection, Row
from data.stream.batch import Packed, Ragged, Sample, collate, pack, to_device
from data.stream.order import (
    Draw,
    Sampler,
    Views,
    evaluation_batches,
    plan_batches,
    train_batches,
)
from data.stream.source import IMAGE, Record, Source, UnreadableImage
from utils import rng
from utils.contracts import Batch, LoaderMachine, State
from utils.errors import UserError
from utils.io.files import Json, ignore_write_errors
from utils.io.safe_text import hide_secrets
from utils.ranks import distributed
from utils.ranks.processes import end_with_parent, shorten_socket_folder
from utils.ranks.signals import leave_to_parent
from utils.record.logging import log

_Problems = list[tuple[str, str]]  # the name of an image and why it is unreadable
# Counters for keys derived from a sample's key.
_FIELDS_KEY = 1
_VIEW_KEY = 2


@dataclass
class Example:
    """The input of a field: the row, and the record before any transform."""

    draw: Draw
    row: Row
    training: bool
    record: Record

    @functools.cached_property  # most fields draw nothing
    def generator(self) -> torch.Generator:
        """A generator for fields, seeded with the sample's key."""
        return torch.Generator().manual_seed(rng.hash_counters(self.draw.key, _FIELDS_KEY))


Fields = Callable[[Example], Mapping[str, Tensor | Ragged]]


def no_fields(example: Example) -> State:
    """Return no fields."""
    return {}


def _key_of(draw: Draw, number: int) -> int:
    """Return the key of a view of a sample; an added view does not change earlier ones."""
    return draw.key if number == 0 else rng.hash_counters(draw.key, _VIEW_KEY, number)


def _start_worker(worker: int) -> None:
    """Leave stop signals to the rank, which still needs the worker; kill it when the rank ends, even if it hangs."""
    leave_to_parent()
    end_with_parent()


class _Results(Queue):
    """A queue of batches. If one cannot be sent, the rank gets the reason; it would wait forever otherwise."""

    def _on_queue_feeder_error(self, error: Exception, result: tuple[int, Any]) -> None:
        fault = RuntimeError(f"a batch cannot be sent ({error})")
        self.put((result[0], ExceptionWrapper((RuntimeError, fault, None))))


class _WorkerContext(ForkContext):
    """Fork processes that ignore SIGTERM; terminate() kills them, because torch then waits for their end."""

    class Process(ForkProcess):
        class _Popen(Popen):
            terminate = Popen.kill

    def Queue(self, maxsize: int = 0) -> Queue:
        """Return a queue that does not lose batches."""
        return _Results(maxsize, ctx=self)


@dataclass(eq=False)
class Loader(Dataset):
    """Read the samples of draws in workers, and give batches on the device.

    views: by name. The first is seeded with the sample's key, each other one with a key derived from it. fields:
    additions of a task, such as labels. report: called with the (name, reason) of unreadable images. windows: other
    views, for batches of which the device has the images, as in data/augment/windows.py.
    """

    collection: Collection
    source: Source
    views: Views
    fields: Fields
    machine: LoaderMachine
    report: Callable[[_Problems], None]
    training: bool
    windows: Any = None

    def __getitems__(self, draws: list[Draw]) -> tuple[Batch | Packed, _Problems]:
        """Return the batch of some draws, and the (name, reason) of each unreadable image; runs in a worker."""
        problems: _Problems = []
        rows = [draw.index for draw in draws]
        self.source.prefetch(rows)
        views = self.windows.views if self.windows is not None and self.windows.has(rows) else self.views
        samples = map(functools.partial(self.read, problems=problems, views=views), draws)
        drawn = {}
        for number, (name, view) in enumerate(views.items()):
            if hasattr(view, "draw"):
                drawn[name] = view.draw(rows, [_key_of(draw, number) for draw in draws])
        with torch.autocast("cpu", enabled=False):  # an evaluation's autocast would refuse to stack half precision
            batch = collate(samples, len(draws), channels_last=self.machine.channels_last) | drawn
        # In a worker. `pack` raises if there is no room; the queue would drop the batch, and the rank wait forever.
        return batch if get_worker_info() is None else pack(batch), problems

    def read(self, draw: Draw, problems: _Problems, views: Views) -> Sample:
        """Return the sample of a draw with its views; if it is unreadable, append the reason to `problems`."""
        row = self.collection.row(draw.index)
        weight = row.weight
        try:
            record = self.source.read(draw.index, draw.key, draw.group)
        except UnreadableImage as error:
            problems.append((error.path, error.reason))
            weight = 0.0
            record = self.source.blank(draw.group)
        weight = 0.0 if draw.position < 0 else weight  # padding
        viewed = {}
        for number, (name, transform) in enumerate(views.items()):
            if not hasattr(transform, "draw"):
                with rng.seeded(_key_of(draw, number)):
                    viewed[name] = transform(record[IMAGE], draw)
        fields = self.fields(Example(draw, row, self.training, record))
        return {"sample_id": draw.index, "key": draw.key, "weight": weight, **viewed, **fields}

    def load(self, batches: Iterable[list[Draw]]) -> Iterator[Batch]:
        """Yield batches on the device. Raises UserError (`runtime.workers`) if workers lack shared memory, or Linux."""
        workers = self.machine.workers
        if workers > 0 and sys.platform == "darwin":  # a fork of a process with threads may crash there
            raise UserError(f"runtime.workers: {workers} need Linux; set runtime.workers=0 or auto")
        of_workers: Json = {}
        if workers > 0:
            shorten_socket_folder()
            of_workers["prefetch_factor"] = self.machine.prefetch_batches
            of_workers["multiprocessing_context"] = _WorkerContext()
        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=workers,
            **of_workers,
            collate_fn=lambda loaded: loaded,
            worker_init_fn=_start_worker,
            pin_memory=self.machine.device.type == "cuda",
            generator=torch.Generator(),  # otherwise torch draws the base seed from its global generator
        )
        try:
            for loaded, problems in loader:
                self.report(problems)
                yield to_device(loaded, self.machine.device)
        except RuntimeError as error:
            if (
                match := re.search(r"RuntimeError: (unable to .*shared memory.*|a batch cannot .*)", str(error))
            ) is None:
                raise
            raise UserError(
                f"runtime.workers: a loader worker has no room for a batch ({match.group(1)}); set runtime.workers=0, "
                "or a lower runtime.workers, runtime.prefetch_batches or loop.micro_batch_size, or give the machine "
                "more shared memory (/dev/shm; docker run --shm-size=8g) or open files (ulimit -n)"
            ) from None

    def prepare(self, batch: Batch) -> Batch:
        """Return a batch as a task reads it, after the hooks of the views, without a host synchronisation."""
        views = self.views if self.views.keys() <= batch.keys() else self.windows.views
        for view in views.values():
            if hasattr(view, "on_device"):
                batch = view.on_device(batch)
        return batch


class UnreadableLog:
    """Count unreadable images, warn of each once, and list them in unreadable.jsonl of the run folder.

    Lines are buffered until the folder exists and its disk accepts them. All ranks append to one file.
    seen: paths of the images that were unreadable on this rank, earlier starts of the run included.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.seen = set()
        text = file.read_text(encoding="utf-8", errors="replace") if file is not None and file.is_file() else ""
        for line in text.split("\n"):
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # an incomplete or damaged line
                self.seen.add(str(json.loads(line)["path"]))
        self._waiting = "" if text.endswith("\n") or not text else "\n"  # after an incomplete line

    def add(self, problems: _Problems) -> None:
        """Add the problems of a batch."""
        for path, reason in problems:
            if path not in self.seen:
                self.seen.add(path)
                log.warning("unreadable image %s: %s; its weight is 0 (%d so far)", path, reason, len(self.seen))
                self._waiting += json.dumps({"path": path, "reason": hide_secrets(reason)}) + "\n"
        if not self._waiting or self._file is None or not self._file.parent.is_dir():
            return
        with ignore_write_errors(self._file):
            with open(self._file, "a", encoding="utf-8") as lines:
                lines.write(self._waiting)
            self._waiting = ""


class TrainStream:
    """The endless stream of training steps: each is a list of this rank's micro-batches on the device.

    prepare: completes a micro-batch.
    """

    def __init__(self, loader: Loader, sampler: Sampler, unreadable: UnreadableLog) -> None:
        self.prepare = loader.prepare
        self.loader = loader
        self.sampler = sampler
        self.unreadable = unreadable
        self.epoch_length, self.chunk = sampler.epoch_length, sampler.chunk

    @property
    def unreadable_count(self) -> int:
        """The number of unreadable images so far, on this rank."""
        return len(self.unreadable.seen)

    def readings(self) -> Mapping[str, float]:
        """Return the metrics of this rank's caches."""
        return self.loader.source.readings()

    def drop_copy(self) -> bool:
        """Free the copy of the images on the device. Return whether there was one."""
        return self.loader.windows is not None and self.loader.windows.drop()

    def path_of(self, sample_id: int) -> str:
        """Return the path of a sample, for messages."""
        return self.loader.collection.row(sample_id).path

    def show(self, batch_size: int, micro_batch_size: int, ranks: int) -> Iterator[Batch]:
        """Yield the micro-batches of the first rank of a run, read in this process."""
        for draws in train_batches(self.sampler, batch_size, micro_batch_size, 0, 0, ranks):
            batch, problems = self.loader.__getitems__(draws)
            self.unreadable.add(problems)
            yield self.prepare(to_device(batch, self.loader.machine.device))

    def steps(self, start_step: int, batch_size: int, micro_batch_size: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, from `start_step` on, before `prepare`; batch_size: over all ranks."""
        rank = distributed.rank()
        ranks = distributed.world_size()
        draws = train_batches(self.sampler, batch_size, micro_batch_size, start_step, rank, ranks)
        batches = self.loader.load(draws)
        while True:
            if self.loader.windows is not None:
                self.loader.windows.refresh()
            yield list(itertools.islice(batches, batch_size // ranks // micro_batch_size))


@dataclass(eq=False)
class EvaluationStream:
    """Rows in batches, each row exactly once over all ranks (`evaluation_batches`); can be iterated repeatedly.

    batch_size: per rank. groups: the shape group of each row, [len(rows)].
    """

    loader: Loader
    rows: Sequence[int]
    batch_size: int
    groups: np.ndarray | None = None
    seed: int = 0

    @property
    def samples(self) -> int:
        """The number of rows, over all ranks."""
        return len(self.rows)

    def in_batches(self, size: int) -> "EvaluationStream":
        """Return the same rows in batches of another size."""
        return replace(self, batch_size=size)

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        groups = plan_batches(self.rows, self.batch_size, self.groups, distributed.world_size())
        return sum(len(starts) for _, _, starts in groups)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device."""
        rank = distributed.rank()
        ranks = distributed.world_size()
        draws = evaluation_batches(self.rows, self.batch_size, self.seed, self.groups, rank, ranks)
        return map(self.loader.prepare, self.loader.load(draws))
