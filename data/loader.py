"""Readers and loaders: from draws to batches on the device.

A worker reads an image, augments it with the sample's key, and adds the fields that the task asked for. An image that
cannot be read is blank, weighs 0, and is reported by path; it never ends a run.
"""

import ctypes
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch, Ragged, Sample, collate, to_device
from data.collection import Collection, Row, RowView
from data.decode import UnreadableImage, read_image
from data.read_ahead import ReadAhead
from data.stream import Draw, EvaluationBatches, RankBatches
from data.transforms import Transform
from utils import rng
from utils.errors import UserError
from utils.io.files import AppendFile
from utils.ranks import distributed
from utils.ranks.signals import SIGNALS
from utils.record.logging import get_logger

log = get_logger(__name__)

# What a task adds to a sample, drawn from the sample's own generator: labels, tag ids, a mask, a timestep.
Fields = Callable[[int, Row | RowView, torch.Generator], dict[str, Tensor | Ragged]]
Loaded = tuple[Batch, list[tuple[str, str]]]
_FIELDS_VIEW = 1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ImageReader(Dataset):
    """Read the sample that a draw names. Picklable; workers open the collection themselves."""

    def __init__(
        self, collection: Collection, transform: Transform, fields: Fields, *, channels: int, max_pixels: int
    ) -> None:
        if channels not in (1, 3):
            raise UserError(
                f"model.in_channels: {channels}; image files are read as 1 channel (grey) or 3 (RGB), so set 1 or 3"
            )
        self.collection, self.transform, self.fields = collection, transform, fields
        self.channels, self.max_pixels = channels, max_pixels

    def file_of(self, draw: Draw) -> Path:
        """Return the file that a draw reads."""
        return self.collection.absolute_path(draw.index)

    def __getitem__(self, draw: Draw) -> tuple[Sample, tuple[str, str] | None]:
        """Return the sample, and (path, reason) where its image could not be read."""
        row, problem, image = self.collection.view(draw.index), None, None
        path, weight = row.path, row.weight
        if weight != 0:  # one that weighs 0 may be so because it kills its decoder
            try:
                pixels = read_image(self.collection.root / path, self.channels, self.max_pixels)
                image = torch.from_numpy(pixels).permute(2, 0, 1)
            except UnreadableImage as error:
                problem = (path, error.reason)
        if image is None:
            image = torch.zeros(self.channels, 64, 64, dtype=torch.uint8)
        with rng.seeded(draw.key):
            image = self.transform(image, draw)
        padding = draw.position < 0
        sample: Sample = {
            "sample_id": torch.tensor(draw.index),
            "key": torch.tensor(draw.key),
            "weight": torch.tensor(0.0 if problem or padding else weight),
            "images": image.contiguous(),
        }
        generator = rng.generator_for(rng.hash_counters(draw.key, _FIELDS_VIEW))
        return sample | self.fields(draw.index, row, generator), problem


def _collate(loaded: Sequence[tuple[Sample, tuple[str, str] | None]]) -> Loaded:
    return collate([sample for sample, _ in loaded]), [problem for _, problem in loaded if problem is not None]


class UnreadableLog:
    """Count unreadable images, warn of each path once, and list them in the run folder's unreadable.jsonl.

    Rows wait where the folder is not made yet or its disk takes none. Ranks append to one file.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stream: AppendFile | None = None
        self._waiting, self._warned = "", False
        self._seen: set[str] = set()
        if file is not None and file.exists():
            text = file.read_bytes().decode("utf-8", errors="replace")
            self._seen = {path for line in text.split("\n") if (path := _listed_path(line)) is not None}
            if text and not text.endswith("\n"):
                self._waiting = "\n"  # so that the next row is none of the torn one

    @property
    def count(self) -> int:
        """Return how many paths were unreadable on this rank, earlier starts of the run included."""
        return len(self._seen)

    def add(self, problems: list[tuple[str, str]]) -> None:
        """Take what a batch reports."""
        for path, reason in problems:
            if path in self._seen:
                continue
            self._seen.add(path)
            log.warning("unreadable image %s: %s; it weighs 0", path, reason)
            self._waiting += json.dumps({"path": path, "reason": reason}) + "\n"
        if self._file is not None:
            self._write(self._file)

    def _write(self, file: Path) -> None:
        """Append the rows that wait; a refusal is a warning, said once."""
        if self._stream is None and self._waiting and file.parent.is_dir():
            try:
                self._stream = AppendFile(file)
            except OSError as error:
                if not self._warned:
                    log.warning("%s cannot be written (%s); its rows are kept meanwhile", file, error.strerror)
                self._warned = True
        if self._stream is not None:
            self._stream.write(self._waiting)  # also nothing: what was refused before is tried again
            self._waiting = ""


def _listed_path(line: str) -> str | None:
    """Return the path of a row; None for a line that a kill or a full disk has torn."""
    try:
        return str(json.loads(line)["path"])
    except (ValueError, TypeError, KeyError):
        return None


def _leave_signals_to_parent(worker: int) -> None:
    """Let a worker outlive what asks a job to stop: a scheduler signals all processes, and the rank still needs it.

    A worker ends when its rank does, however either of them hangs.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's worker looks for its parent, but only between two batches
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


class _WorkerPopen(Popen):
    """A forked process that ignores SIGTERM: torch and multiprocessing, which wait for its end, kill it."""

    terminate = Popen.kill


class _WorkerProcess(ForkProcess):
    _Popen = staticmethod(_WorkerPopen)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess


def _data_loader(reader: ImageReader, batches: Any, *, workers: int, prefetch: int, device: torch.device) -> DataLoader:
    forks = workers > 0 and multiprocessing.get_start_method() == "fork"
    return DataLoader(
        reader,
        batch_sampler=ReadAhead(batches, reader.file_of),
        num_workers=workers,
        prefetch_factor=prefetch if workers > 0 else None,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_parent,
        multiprocessing_context=_WorkerContext() if forks else None,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        generator=torch.Generator(),  # the workers' base seed would else be drawn from torch's global generator
    )


class TrainLoader:
    """The endless stream as steps: each a list of this rank's micro-batches on the device."""

    def __init__(
        self,
        reader: ImageReader,
        sampler: Any,
        *,
        seed: int,
        device: torch.device,
        workers: int,
        prefetch_batches: int,
        unreadable: UnreadableLog,
    ) -> None:
        self.reader, self.sampler, self.seed = reader, sampler, seed
        self.device, self.workers, self.prefetch_batches = device, workers, prefetch_batches
        self.unreadable = unreadable

    def path_of(self, sample_id: int) -> str:
        """Return the path of a sample as the collection states it, for messages."""
        return self.reader.collection.row(sample_id).path

    def steps(self, start_step: int, plan: Any) -> Iterator[list[Batch]]:
        """Yield the micro-batches of step after step, from `start_step` on.

        `plan` gives global_batch_size, micro_batch_size and accum_steps (engine/plan.py).
        """
        batches = RankBatches(
            self.sampler,
            seed=self.seed,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            rank=distributed.rank(),
            world_size=plan.world_size,
            start_step=start_step,
        )
        loader = _data_loader(
            self.reader, batches, workers=self.workers, prefetch=self.prefetch_batches, device=self.device
        )
        step: list[Batch] = []
        for batch, problems in loader:
            self.unreadable.add(problems)
            step.append(to_device(batch, self.device))
            if len(step) == plan.accum_steps:
                yield step
                step = []


class EvaluationLoader:
    """Some rows, each exactly once over all ranks; iterate it as often as needed."""

    def __init__(
        self,
        reader: ImageReader,
        rows: Any,
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
        workers: int,
        unreadable: UnreadableLog,
    ) -> None:
        self.batches = EvaluationBatches(
            rows, seed=seed, batch_size=batch_size, rank=distributed.rank(), world_size=distributed.world_size()
        )
        self.reader, self.device, self.workers, self.unreadable = reader, device, workers, unreadable

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device."""
        loader = _data_loader(self.reader, self.batches, workers=self.workers, prefetch=2, device=self.device)
        for batch, problems in loader:
            self.unreadable.add(problems)
            yield to_device(batch, self.device)
