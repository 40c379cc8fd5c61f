"""Ranks: which one this process is, and collectives.

Processes are started by torchrun, by SLURM, or as plain `python`. Without a process group, the world has one rank.
"""

import gc
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

RANKS_VARIABLE = "ATELIER_DRY_RUN_RANKS"  # of a job that a dry run checks before it is queued
GPUS_VARIABLE = "ATELIER_DRY_RUN_GPUS"  # set where that job will have GPUs
_FIRST_PORT, _PORTS = 10_000, 20_000  # below 32768, where Linux begins to give ports to any program that asks
_is_alone = False
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of the `size` ranks this process is, on its node (`local_rank`) too, and where the ranks meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    address: str | None = None
    port: int | None = None


def _first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: `gpu[03-05,9]-ib,x1` gives `gpu03-ib`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]+\])*", node_list).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def detect_world(env: Mapping[str, str] = os.environ) -> World:
    """Read the launcher's variables: torchrun's first, then those of a SLURM step, else a world of one.

    A batch script's own shell has SLURM_NTASKS but is not a step, so only SLURM_STEP_NUM_TASKS counts.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
        address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500"))
        return World(rank, size, local, "torchrun", address, port)
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        rank, size, local = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        address = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        # The same port on all tasks of a step, another one for the next step or job.
        port = _FIRST_PORT + (int(env.get("SLURM_JOB_ID", "0")) + 1009 * int(env.get("SLURM_STEP_ID", "0"))) % _PORTS
        return World(rank, size, local, "slurm", address, int(env.get("MASTER_PORT") or port))
    return World()


def meet_ranks(store: dist.Store, world: World, timeout_sec: float) -> str:
    """Return a name shared by the ranks of this start only.

    torchrun's store outlives ranks that it restarts: without a new name, they may read the addresses of the dead ranks.
    Each rank writes a hello with a unique word; rank 0 answers all that it sees, until all ranks have read theirs.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{world.rank}", own)
    if world.rank != 0:
        name = store.get(f"welcome/{own}").decode()
        store.set(f"arrived/{name}/{world.rank}", "")
        return name
    missing, end = set(range(1, world.size)), time.monotonic() + timeout_sec
    while missing:
        for other in sorted(missing):
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"arrived/{own}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} did not join within {timeout_sec:.0f} s")
        time.sleep(0.01)
    return own


def init_process_group(device_type: str, timeout_sec: float) -> World:
    """Join the ranks once per process: NCCL on GPUs, gloo on CPUs. A second call returns the world of the first."""
    world = detect_world()
    if world.size == 1 or dist.is_initialized():
        return world
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = str(world.address), str(world.port)
    timeout, backend, device = timedelta(seconds=timeout_sec), "gloo", None
    if device_type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # host objects and tensors on the CPU take no GPU memory
        device = torch.device("cuda", local_device_index(world))
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    if world.launcher == "torchrun":
        store = dist.PrefixStore(f"atelier/{meet_ranks(store, world, timeout_sec)}", store)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device
    )
    return world


def local_device_index(world: World | None = None) -> int:
    """Return the GPU of a process: its local rank, or 0 where the scheduler shows each process one GPU only.

    Raises UserError where the node has fewer GPUs than processes.
    """
    world, count = world or detect_world(), torch.cuda.device_count()
    if count == 1 and world.launcher == "slurm":  # srun --gpus-per-task=1
        return 0
    if world.local_rank >= count:
        raise UserError(
            f"runtime.device: rank {world.rank} needs GPU {world.local_rank} of its node, which has {count}; start at "
            "most that many processes per node (--nproc_per_node)"
        )
    return world.local_rank


def is_distributed() -> bool:
    """Return whether a process group of more than one rank is up."""
    return not _is_alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this rank be a world of one inside the context, so that no helper of this file waits for another."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is rank 0: the only one that writes shared files."""
    return rank() == 0


def planned_world_size() -> int:
    """Return the number of ranks that a dry run checks: of the job to be queued, or this world's."""
    return int(os.environ.get(RANKS_VARIABLE) or world_size())


def plans_gpus() -> bool:
    """Return whether this is the dry run of a job that will have GPUs, which this machine may lack."""
    return bool(os.environ.get(GPUS_VARIABLE))


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, in the ranks' order, on every rank; all ranks give tensors of one shape."""
    if not is_distributed():
        return tensor
    rows = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


def rank_zero_call(call: Callable[[], T]) -> T:
    """Run `call` on rank 0 alone and return its value on every rank.

    An error on rank 0 is raised on all of them, so none is left waiting; a user's error keeps its kind.
    """
    found: list[Any] = [None, None]  # the value, the error
    if is_main():
        try:
            found[0] = call()
        except Exception as error:
            found[1] = error
    if is_distributed():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_same(name: str, value: Any) -> None:
    """Raise UserError where the ranks hold different values: another version of the code, another configuration."""
    values = gather_objects(value)
    if odd := [index for index, other in enumerate(values) if other != values[0]]:
        raise UserError(
            f"{name}: ranks {odd} differ from rank 0 ({values[odd[0]]!r} against {values[0]!r}); "
            "start all ranks with one command, one code version and one set of files"
        )


def shutdown(*, failed: bool = False) -> bool:
    """Leave the process group, if there is one, and return whether there was.

    Models wrapped for DDP must be freed before: otherwise gloo's worker threads sometimes abort the interpreter at exit
    (torch 2.13 to 2.15), after a run that succeeded. Callers drop their references, and the garbage is collected here.
    A failed rank with NCCL does not leave: that waits for peers, which may wait for this rank in a collective.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    gc.collect()
    if not (failed and "nccl" in str(dist.get_backend_config())):
        dist.destroy_process_group()
    return True
