"""Fine-tuning in trouble: for the tests of survival. The variable TROUBLE says which, what comes after it how much.

slow_evaluation SECONDS          each batch of an evaluation takes so long, and says so on stderr
slow_save SECONDS                each file of a checkpoint takes so long
full_disk FIRST LAST             the disk refuses checkpoints of these steps
nan FIRST LAST [RANK]            the losses of the samples that these steps (from 1) read are NaN; only one rank's
kill_rank RANK STEP MARKER       this rank kills itself before this step (from 1), unless MARKER is there
kill_worker STEP MARKER          a loader's worker of rank 0 is killed before this step, unless MARKER is there
little_memory SIZE ...           the device of each rank takes a batch of so many samples in training
hang_reading POSITION            reading the sample at this position of the stream never ends; its process is told
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import finetune
from data.stream.loader import EvaluationStream, Loader
from engine.run import checkpoint
from engine.tasks.classification import ClassificationTask
from engine.update.learner import Learner
from utils import rng
from utils.ranks import distributed


def slow_evaluation(seconds):
    batches = EvaluationStream.__iter__

    def slow(self):
        for batch in batches(self):
            os.write(2, b"evaluating slowly\n")
            time.sleep(float(seconds))
            yield batch

    EvaluationStream.__iter__ = slow


def slow_save(seconds):
    checksum = checkpoint.sha256_file

    def slow(path):
        os.write(2, b"saving slowly\n")
        time.sleep(float(seconds))
        return checksum(path)

    checkpoint.sha256_file = slow


def full_disk(first, last):
    write = checkpoint.write_tensors

    def full(path, *arguments):
        if int(first) <= int(path.parent.name.split(".")[1].removeprefix("step_")) <= int(last):
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    checkpoint.write_tensors = full


def nan(first, last, rank=None):
    forward = ClassificationTask.forward
    seed, batch_size = 0, 8  # of the tests that use it
    positions = range((int(first) - 1) * batch_size, int(last) * batch_size)
    keys = torch.tensor([rng.sample_key(seed, position) for position in positions])

    def poisoned(self, batch, progress):
        output = forward(self, batch, progress)
        bad = torch.isin(batch["key"], keys)
        if rank is not None and distributed.rank() != int(rank):
            bad = torch.zeros_like(bad)
        output.loss = output.loss + torch.where(bad, float("nan"), 0.0)
        return output

    ClassificationTask.forward = poisoned


def _before_step(step, marker, act):
    update = Learner.update

    def troubled(learner, *arguments, **named):
        if learner.step == int(step) - 1 and not Path(marker).exists():
            Path(marker).touch()
            act()
        return update(learner, *arguments, **named)

    Learner.update = troubled


def kill_rank(rank, step, marker):
    if int(os.environ.get("RANK", "0")) == int(rank):
        _before_step(step, marker, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_worker(step, marker):
    if int(os.environ.get("RANK", "0")) == 0:
        _before_step(step, marker, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))


def little_memory(*sizes):
    forward = ClassificationTask.forward
    most = int(sizes[int(os.environ.get("RANK", "0"))])

    def limited(self, batch, progress):
        if len(batch["key"]) > most:
            raise torch.OutOfMemoryError
        return forward(self, batch, progress)

    ClassificationTask.forward = limited


def hang_reading(position):
    read = Loader.read

    def hanging(self, draw, *given, **named):
        if draw.position == int(position):
            os.write(2, f"process {os.getpid()} reads for ever\n".encode())
            time.sleep(3600)
        return read(self, draw, *given, **named)

    Loader.read = hanging


# What the troubles replace.
PATCHED = (
    (EvaluationStream, "__iter__"),
    (Loader, "read"),
    (checkpoint, "sha256_file"),
    (checkpoint, "write_tensors"),
    (Learner, "update"),
    (ClassificationTask, "forward"),
)


def start(name, *amounts):
    globals()[name](*amounts)


if __name__ == "__main__":
    start(*os.environ["TROUBLE"].split())
    finetune.main()
