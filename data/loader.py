"""Readers and loaders: from draws to batches on the device.

A worker reads a sample's record from the source, makes the named views of its image with the sample's key, and adds the
fields of the task. A sample that cannot be read is blank, has weight 0 and is reported by name; it never ends a run.
"""

import ctypes
import functools
import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.batch import DeviceCopier, Ragged, Sample, collate, to_device
from data.collection import Collection, RowView
from data.image_formats import UnreadableImage
from data.read_ahead import DrawBatch, ReadAhead, with_coming
from data.source import IMAGE, Record, Source
from data.stream import Draw, EvaluationBatches, RankBatches, Sampler
from data.transforms import Transform
from utils import rng
from utils.contracts import Batch, BatchPlan, DeviceHook, Machine
from utils.errors import UserError
from utils.io.files import AppendFile
from utils.ranks import distributed
from utils.ranks.signals import SIGNALS
from utils.record.logging import get_logger

log = get_logger(__name__)

Loaded = tuple[Batch, list[tuple[str, str]]]
# Counters of the keys that are hashed from a sample's key.
_FIELDS_KEY, _VIEW_KEY = 1, 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Example:
    """What a field may look at: the row, the record before any transform, and the views made of it.

    draw: its row's number, and its position in the stream; in evaluation both are the row's number. training: False in
    evaluation streams, so that label dropout, say, does not reach the validation split.
    """

    draw: Draw
    row: RowView
    training: bool
    record: Record
    views: Mapping[str, Tensor]

    @functools.cached_property  # most fields draw nothing
    def generator(self) -> torch.Generator:
        """A generator that is seeded with the sample's key, for the fields alone."""
        return rng.generator_for(rng.hash_counters(self.draw.key, _FIELDS_KEY))


# What a task adds to a sample: labels, tag ids, a mask.
Fields = Callable[[Example], Mapping[str, Tensor | Ragged]]


def no_fields(example: Example) -> dict[str, Tensor]:
    """Add nothing to a sample."""
    return {}


class SampleReader(Dataset):
    """Read the sample of a draw. Picklable; workers open the collection themselves.

    views: the transforms that make named tensors of the record's image. The first is seeded with the sample's key, the
    others with keys hashed from it, so another view changes none of those before it. Other tensors of a record reach a
    sample by its fields. channels_last: the memory format of a batch's images.
    """

    def __init__(
        self,
        collection: Collection,
        source: Source,
        views: Mapping[str, Transform],
        fields: Fields,
        *,
        training: bool,
        channels_last: bool = False,
    ) -> None:
        self.collection, self.source = collection, source
        self.views, self.fields, self.training = dict(views), fields, training
        self.channels_last = channels_last

    def __getitems__(self, draws: DrawBatch) -> Loaded:
        """Return the batch of some draws, and the (name, reason) of each that could not be read."""
        self.source.prefetch([draw.index for draw in (*draws, *draws.coming)])
        problems: list[tuple[str, str]] = []
        with torch.autocast("cpu", enabled=False):  # of an evaluation: it would refuse to join half precision
            samples = self._samples(draws, problems)
            return collate(samples, len(draws), channels_last=self.channels_last), problems

    def _samples(self, draws: DrawBatch, problems: list[tuple[str, str]]) -> Iterator[Sample]:
        for draw in draws:
            sample, problem = self[draw]
            if problem is not None:
                problems.append(problem)
            yield sample

    def __getitem__(self, draw: Draw) -> tuple[Sample, tuple[str, str] | None]:
        """Return the sample, and (name, reason) where it could not be read."""
        row, problem, record = self.collection.view(draw.index), None, None
        weight = row.weight
        if weight != 0:  # a file of weight 0 is not opened: it may crash its decoder
            try:
                record = self.source.read(draw.index)
            except UnreadableImage as error:
                problem = (self.source.name_of(draw.index), error.reason)
        if record is None:
            record = self.source.blank(draw.group)
        views = {}
        for number, (name, transform) in enumerate(self.views.items()):
            key = draw.key if number == 0 else rng.hash_counters(draw.key, _VIEW_KEY, number)
            with rng.seeded(key):
                views[name] = transform(record[IMAGE], draw)
        padding = draw.position < 0
        sample: Sample = {
            "sample_id": draw.index,
            "key": draw.key,
            "weight": 0.0 if problem or padding else weight,
            **views,
        }
        return {**sample, **self.fields(Example(draw, row, self.training, record, views))}, problem


def _share(loaded: Loaded) -> Loaded:
    """Move a batch to shared memory, in a worker."""
    batch, problems = loaded
    if get_worker_info() is not None:
        # Where there is no room, this raises. The queue would drop the batch instead, and the rank wait for ever.
        batch = {name: tensor.share_memory_() for name, tensor in batch.items()}
    return batch, problems


class UnreadableLog:
    """Count unreadable images, warn of each once, and list them in the run folder's unreadable.jsonl.

    Rows are kept until the folder exists and its disk accepts them. Ranks append to one file.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stream: AppendFile | None = None
        self._waiting, self._warned = "", False
        self._seen: set[str] = set()
        if file is not None and file.is_file():
            text = file.read_bytes().decode("utf-8", errors="replace")
            self._seen = {path for line in text.split("\n") if (path := _listed_path(line)) is not None}
            if text and not text.endswith("\n"):
                self._waiting = "\n"  # the next row starts on a line of its own

    @property
    def count(self) -> int:
        """Return how many paths were unreadable on this rank, earlier starts of the run included."""
        return len(self._seen)

    def add(self, problems: list[tuple[str, str]]) -> None:
        """Take the problems of a batch."""
        for path, reason in problems:
            if path in self._seen:
                continue
            self._seen.add(path)
            log.warning("unreadable image %s: %s; its weight is 0", path, reason)
            self._waiting += json.dumps({"path": path, "reason": reason}) + "\n"
        if self._file is not None:
            self._write(self._file)

    def _write(self, file: Path) -> None:
        """Append the waiting rows; a write error is one warning."""
        if self._stream is None and self._waiting and file.parent.is_dir():
            try:
                self._stream = AppendFile(file)
            except OSError as error:
                if not self._warned:
                    log.warning("%s cannot be written (%s); its rows are kept in memory", file, error.strerror)
                self._warned = True
        if self._stream is not None:
            self._stream.write(self._waiting)  # an empty text too: it retries what failed before
            self._waiting = ""


def _listed_path(line: str) -> str | None:
    """Return the path of a row; None for a line that a kill or a full disk has torn."""
    try:
        return str(json.loads(line)["path"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore stop signals in a worker: a scheduler sends them to all processes, and the rank still needs the worker.

    A worker is killed when its rank ends, even if either of them hangs.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's worker looks for its parent, but only between two batches
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


class _WorkerPopen(Popen):
    """A forked process that ignores SIGTERM, so terminate() kills it: torch and multiprocessing wait for its end."""

    terminate = Popen.kill


class _WorkerProcess(ForkProcess):
    _Popen = staticmethod(_WorkerPopen)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess


def _data_loader(reader: SampleReader, batches: RankBatches | EvaluationBatches, machine: Machine) -> DataLoader:
    workers = machine.workers
    forks = workers > 0 and multiprocessing.get_start_method() == "fork"
    return DataLoader(
        reader,
        batch_sampler=with_coming(ReadAhead(batches, reader.source.file_of, batches.blocks_ahead), workers),
        num_workers=workers,
        prefetch_factor=machine.prefetch_batches if workers > 0 else None,
        collate_fn=_share,
        worker_init_fn=_leave_signals_to_parent,
        multiprocessing_context=_WorkerContext() if forks else None,
        pin_memory=machine.device.type == "cuda",
        persistent_workers=False,
        generator=torch.Generator(),  # otherwise the workers' base seed is drawn from torch's global generator
    )


def _loaded(loader: DataLoader) -> Iterator[Loaded]:
    """Yield what is loaded. Raises UserError (`runtime.workers`) where workers have too little shared memory for it."""
    try:
        yield from loader
    except RuntimeError as error:
        if (found := re.search(r"RuntimeError: (unable to .*shared memory.*)", str(error))) is None:
            raise
        raise UserError(
            f"runtime.workers: a loader worker has no room for a batch ({found.group(1)}); set runtime.workers=0, or a "
            "lower runtime.workers, runtime.prefetch_batches or loop.batch_size, or give the machine more shared "
            "memory (/dev/shm; docker run --shm-size=8g)"
        ) from None


class _Loader:
    """What both loaders do: load, report unreadable samples, copy to the device, call the hook."""

    def __init__(
        self, reader: SampleReader, machine: Machine, unreadable: UnreadableLog, on_device: DeviceHook | None
    ) -> None:
        self.reader, self.unreadable = reader, unreadable
        self._machine, self._on_device = machine, on_device

    def _load(self, batches: RankBatches | EvaluationBatches) -> Iterator[Batch]:
        """Yield batches on the device."""
        copy = DeviceCopier(self._machine.device)
        for loaded, problems in _loaded(_data_loader(self.reader, batches, self._machine)):
            self.unreadable.add(problems)
            batch = copy(loaded)
            yield batch if self._on_device is None else self._on_device(batch)


class TrainLoader(_Loader):
    """The endless stream as steps: each a list of this rank's micro-batches on the device.

    on_device: called with each micro-batch after the copy; it draws from batch["key"] (utils/rng.py: normal, uniform).
    """

    def __init__(
        self,
        reader: SampleReader,
        sampler: Sampler,
        machine: Machine,
        *,
        seed: int,
        unreadable: UnreadableLog,
        on_device: DeviceHook | None = None,
    ) -> None:
        super().__init__(reader, machine, unreadable, on_device)
        self.sampler, self._seed = sampler, seed

    @property
    def epoch_length(self) -> int:
        """Positions per epoch."""
        return self.sampler.epoch_length

    @property
    def chunk(self) -> int | None:
        """Neighbouring positions of one shape; None where the sampler groups nothing."""
        return self.sampler.chunk

    @property
    def unreadable_count(self) -> int:
        """Samples that could not be read so far, on this rank."""
        return self.unreadable.count

    def readings(self) -> Mapping[str, float]:
        """Return what the caches of this rank's source have counted so far."""
        return self.reader.source.readings()

    @functools.cached_property
    def _examples(self) -> list[tuple[int, int]]:
        """(row, group) of a sample of each shape."""
        return [self.sampler.at(0)] if self.chunk is None else self.sampler.examples()

    @property
    def shapes(self) -> int:
        """The number of shapes that samples come in; 1 where the sampler groups nothing."""
        return len(self._examples)

    def trial_batch(self, shape: int, size: int) -> Batch:
        """Return `size` times one sample of a shape, on the device, with weight 1; no part of the stream."""
        index, group = self._examples[shape]
        sample, _ = self.reader[Draw(0, index, rng.sample_key(self._seed, 0), group)]
        batch = collate([sample] * size, size, channels_last=self.reader.channels_last)
        batch = to_device({**batch, "weight": torch.ones(size)}, self._machine.device)
        return batch if self._on_device is None else self._on_device(batch)

    def path_of(self, sample_id: int) -> str:
        """Return the path of a sample as the collection states it, for messages."""
        return self.reader.collection.view(sample_id).path

    def steps(self, start_step: int, plan: BatchPlan) -> Iterator[list[Batch]]:
        """Yield the micro-batches of step after step, from `start_step` on."""
        batches = RankBatches(
            self.sampler,
            seed=self._seed,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            rank=distributed.rank(),
            world_size=plan.world_size,
            start_step=start_step,
        )
        step: list[Batch] = []
        for batch in self._load(batches):
            step.append(batch)
            if len(step) == plan.accum_steps:
                yield step
                step = []


class EvaluationLoader(_Loader):
    """Some rows, each exactly once over all ranks; iterate it as often as needed."""

    def __init__(
        self,
        reader: SampleReader,
        batches: EvaluationBatches,
        machine: Machine,
        *,
        unreadable: UnreadableLog,
        on_device: DeviceHook | None = None,
    ) -> None:
        super().__init__(reader, machine, unreadable, on_device)
        self.batches = batches

    @property
    def samples(self) -> int:
        """Samples over all ranks."""
        return self.batches.samples

    def set_batch_size(self, batch_size: int) -> None:
        """Make batches of another size."""
        self.batches.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device."""
        yield from self._load(self.batches)
