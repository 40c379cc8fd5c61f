"""`loop.batch_size=auto`: the largest micro-batch that the device's memory takes, searched before the first update.

    choose_batch_size(run, config)      on all ranks, before a checkpoint is loaded; sets the run's plan

A trial is two updates of two micro-batches, as the run makes them: what comes second finds the gradients of the first
micro-batch, and the optimiser's state of the first update. Samples of every shape (bucket) are tried, and the smallest
result serves all, because all micro-batches of a run have one size. A share of the memory stays free. The trials are
undone bit for bit. Each rank tries alone; of several ranks, a trial has the memory of their gradients twice.

The size and the device's name are kept in the run folder, and read again when the run is resumed.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import FIRST_BATCH_SIZE, TrainingConfig
from engine.learner import Learner
from engine.lr_finder import thaw, undone
from engine.plan import list_batch_sizes, split_batch
from engine.run_parts import Run
from engine.runtime import Runtime
from utils.config.bounds import BatchSize
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.files import read_json, write_json
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

_RESERVE = 0.05  # of the device's memory: for what evaluations keep, and for gaps between pieces


class Found(Strict):
    """What the run folder keeps of a search."""

    batch_size: BatchSize
    device: str


def check_auto(config: TrainingConfig, runtime: Runtime) -> None:
    """Raise UserError where `loop.batch_size=auto` has no memory to search, or ranks cannot search alone."""
    if config.loop.batch_size != "auto":
        return
    if runtime.device.type == "cpu" and not distributed.plans_gpus():
        raise UserError("loop.batch_size: auto searches the memory of a GPU, and this is a CPU; set a number")
    # A rank whose memory ends would leave the others waiting in a collective of the forward pass.
    if distributed.is_distributed() and (config.runtime.parallel == "fsdp" or config.runtime.sync_batchnorm):
        raise UserError(
            "loop.batch_size: auto lets each rank search alone, which runtime.parallel=fsdp and "
            "runtime.sync_batchnorm=true rule out; set a number"
        )


def choose_batch_size(run: Run, config: TrainingConfig) -> None:
    """Set what `loop.batch_size=auto` stands for, in training and evaluations; a configured number stays.

    Raises UserError where it was found on another device, where what was kept cannot be read, or where no size fits.
    """
    if config.loop.batch_size != "auto":
        return
    plan, chunk, file = run.plan, run.streams.train.chunk, run.saver.folder.path / "batch_size.json"
    device = distributed.broadcast_object(_name_of(run.learner.runtime.device))
    found = distributed.rank_zero_call(lambda: _read(file))
    if found is None:
        found = Found(batch_size=_find(run), device=device)
        distributed.rank_zero_call(lambda: write_json(file, found.model_dump()))
    elif found.device != device:
        raise UserError(
            f"loop.batch_size: auto found {found.batch_size} on {found.device}, and this is {device}; set "
            f"loop.batch_size={found.batch_size} or another number, or remove {file} to search again"
        )
    micro, accum = split_batch(plan.global_batch_size, plan.world_size, found.batch_size, chunk)
    run.plan = replace(plan, micro_batch_size=micro, accum_steps=accum)
    for loader in run.streams.evaluation.values():
        loader.set_batch_size(micro)
    log.info("loop.batch_size: auto is %d on %s; %d micro-batches an update", micro, device, accum)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(file: Path) -> Found | None:
    if not file.exists():
        return None
    try:
        return Found.model_validate(read_json(file))
    except ValueError as error:
        raise UserError(f"loop.batch_size: {file} is damaged; set a number, or remove it to search again") from error


def _find(run: Run) -> int:
    """Return the largest size that fits on every rank, and leave no trace of the trials."""
    learner, train, plan = run.learner, run.streams.train, run.plan
    share = plan.global_batch_size // plan.world_size

    def fits(shape: int, size: int) -> bool:
        own = _fits(learner, lambda: [train.trial_batch(shape, size)] * min(2, share // size))
        everywhere = all(distributed.gather_objects(own))
        log.debug("loop.batch_size: shape %d of %d: %d fits: %s", shape + 1, train.shapes, size, everywhere)
        return everywhere

    log.info("loop.batch_size: auto; searching what the memory takes, with %d shapes", train.shapes)
    with undone(learner), _reserved(learner.runtime.device):
        thaw(learner, plan.total_steps)
        return search(list_batch_sizes(plan.global_batch_size, plan.world_size, train.chunk), train.shapes, fits)


def search(sizes: Sequence[int], shapes: int, fits: Callable[[int, int], bool]) -> int:
    """Return the largest of the rising `sizes` for which fits(shape, size) holds for every shape, counted from 0.

    The first shape finds a size, which the others can only lower. Raises UserError where not even the first size fits.
    """
    place = bisect_right(sizes, FIRST_BATCH_SIZE) - 1
    for shape in range(shapes):
        grows = shape == 0
        while not fits(shape, sizes[place]):
            if place == 0:
                raise UserError(
                    f"loop.batch_size: auto, but the device's memory does not take a micro-batch of {sizes[0]}; set "
                    "runtime.grad_checkpointing=true, or a smaller model or image"
                )
            place, grows = place - 1, False
        while grows and place + 1 < len(sizes) and fits(shape, sizes[place + 1]):
            place += 1
    return sizes[place]


def _fits(learner: Learner, load: Callable[[], Sequence[Batch]]) -> bool:
    """Return whether this rank alone can make two updates of the micro-batches that `load` returns."""
    wrapped, learner.model = learner.model, learner.task
    try:
        with distributed.alone():
            batches = load()
            for _ in range(2):
                learner.update(batches)
        fits = True
    except torch.OutOfMemoryError:
        fits = False  # what the pass has kept is freed only after this clause
    finally:
        learner.model = wrapped
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


@contextmanager
def _reserved(device: torch.device) -> Iterator[None]:
    """Keep the reserve of a GPU's memory away from the trials; their peak does not count as the run's."""
    if device.type != "cuda":
        yield
        return
    reserve = torch.empty(int(_RESERVE * torch.cuda.mem_get_info(device)[1]), dtype=torch.uint8, device=device)
    yield
    del reserve
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
