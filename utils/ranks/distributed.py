"""Ranks and collectives.

torchrun, SLURM or plain `python` start the processes. Without a process group, the world has one rank.
torch is imported at the first collective: commands that need no network start a second earlier.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import TimeoutError as NoAnswer
from multiprocessing.pool import ThreadPool
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from utils.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

RANKS_VARIABLE = "ATELIER_DRY_RUN_RANKS"  # the ranks of a job, for the dry run before it is queued
GPUS_VARIABLE = "ATELIER_DRY_RUN_GPUS"  # set if that job will have GPUs
_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}  # with usual values
_FIRST_PORT = 10_000
_PORTS = 20_000  # all below 32768, the first of Linux's ephemeral ports
_GROUP_PATIENCE = 4  # the timeout of collectives, as a multiple of the watchdog's, which names the rank
_ANSWER_SEC = 5.0  # torch's own limit ends first, where it has one
_POLL_STEPS = 4  # between two votes: a gloo collective of many ranks takes milliseconds
T = TypeVar("T")


class World(NamedTuple):
    """This process's rank among `size` ranks, its rank on its node, and the address where the ranks meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    address: str | None = None
    port: int | None = None


def detect_world(env: Mapping[str, str] = os.environ) -> World:
    """Read the variables of torchrun or of a SLURM step; without them, return a world of one.

    SLURM_STEP_NUM_TASKS identifies a step: SLURM_NTASKS is also set in the shell of a batch script.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local, port = (int(env.get(name, usual)) for name, usual in _TORCHRUN.items())
        return World(rank, size, local, "torchrun", env.get("MASTER_ADDR", "127.0.0.1"), port)
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        rank, size, local = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        first = re.match(r"(?:[^,\[]|\[[^\]]+\])*", nodes).group()  # gpu[03-05,9]-ib of gpu[03-05,9]-ib,x1
        address = env.get("MASTER_ADDR") or re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)  # gpu03-ib
        # All tasks of a step have the same port; other steps and jobs have others.
        port = _FIRST_PORT + (int(env.get("SLURM_JOB_ID", "0")) + 1009 * int(env.get("SLURM_STEP_ID", "0"))) % _PORTS
        return World(rank, size, local, "slurm", address, int(env.get("MASTER_PORT") or port))
    return World()


def meet_ranks(store: dist.Store, world: World, timeout_sec: float) -> str:
    """Return a name that only the ranks of this start share.

    torchrun's store outlives restarted ranks: without a new name, ranks may read the addresses of dead ones. Each rank
    publishes a unique token. Rank 0 answers every token with the name until all ranks have read it.
    """
    token = uuid.uuid4().hex
    store.set(f"hello/{world.rank}", token)
    if world.rank != 0:
        name = store.get(f"welcome/{token}").decode()
        store.set(f"arrived/{name}/{world.rank}", "")
        return name
    missing = set(range(1, world.size))
    end = time.monotonic() + timeout_sec
    while missing:
        for other in sorted(missing):
            store.set(f"welcome/{store.get(f'hello/{other}').decode()}", token)
            if store.check([f"arrived/{token}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} did not join within {timeout_sec:.0f} s")
        time.sleep(0.01)
    return token


def init_process_group(device_type: str, timeout_sec: float) -> None:
    """Join the process group, with NCCL on GPUs and gloo on CPUs. A second call does nothing.

    timeout_sec: the ranks must meet within it.
    Raises UserError (`MASTER_ADDR`, `MASTER_PORT`) if the ranks cannot meet.
    """
    import torch
    import torch.distributed as dist

    world = detect_world()
    if world.size == 1 or _has_group():
        return
    os.environ |= {"MASTER_ADDR": str(world.address), "MASTER_PORT": str(world.port)}
    backend = "gloo"
    device = None
    if device_type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # objects and CPU tensors take no GPU memory
        device = torch.device("cuda", local_device_index(world))
        torch.cuda.set_device(device)
    meeting = dist.rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=timeout_sec))
    try:
        with ThreadPool(1) as pool:  # torch waits for ever for a program that holds the port and does not answer
            store, _, _ = pool.apply_async(next, [meeting]).get(timeout_sec + _ANSWER_SEC)
    except (dist.DistError, NoAnswer) as error:
        reason = str(error).partition("\n")[0] or f"no answer within {timeout_sec:.0f} s (runtime.hang_timeout_sec)"
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: the ranks cannot meet at {world.address}:{world.port}: {reason}; name the node "
            "of rank 0 and a free port of it"
        ) from error
    if world.launcher == "torchrun":
        store = dist.PrefixStore(f"atelier/{meet_ranks(store, world, timeout_sec)}", store)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, device_id=device,
        timeout=timedelta(seconds=_GROUP_PATIENCE * timeout_sec),
    )  # fmt: skip


def local_device_index(world: World | None = None) -> int:
    """Return the index of a process's GPU: its local rank, or 0 if the scheduler gives each process one GPU.

    Raises UserError if the node has fewer GPUs than processes.
    """
    import torch

    world = world or detect_world()
    count = torch.cuda.device_count()
    if count == 1 and world.launcher == "slurm":  # srun --gpus-per-task=1
        return 0
    if world.local_rank >= count:
        raise UserError(
            f"runtime.device: rank {world.rank} needs GPU {world.local_rank} of its node, which has {count}; start at "
            "most one process per GPU (--nproc_per_node)"
        )
    return world.local_rank


def _dist() -> ModuleType:
    import torch.distributed as dist

    return dist


def _has_group() -> bool:
    return "torch" in sys.modules and _dist().is_available() and _dist().is_initialized()


def is_distributed() -> bool:
    """Return whether there is a process group of more than one rank."""
    return _has_group() and _dist().get_world_size() > 1


def rank() -> int:
    """Return this process's rank."""
    return _dist().get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return _dist().get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is rank 0, the only rank that writes shared files."""
    return rank() == 0


def planned_world_size() -> int:
    """Return the number of ranks of the job that a dry run checks, or of this world."""
    return int(os.environ.get(RANKS_VARIABLE) or world_size())


def plans_gpus() -> bool:
    """Return whether this is the dry run of a job with GPUs, which this machine may lack."""
    return bool(os.environ.get(GPUS_VARIABLE))


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        _dist().barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    if is_distributed():
        _dist().all_reduce(tensor)
    return tensor


def any_rank(*asks: bool) -> list[bool]:
    """Return for each request whether a rank makes it. All ranks call it together; no device is waited for."""
    import torch

    return [count > 0 for count in all_reduce_sum(torch.tensor(asks, dtype=torch.int32)).tolist()]


def poll(step: int, *asks: bool) -> list[bool]:
    """Return for each request whether a rank makes it; between ranks at each `_POLL_STEPS` steps."""
    if is_distributed() and step % _POLL_STEPS:
        return [False] * len(asks)
    return any_rank(*asks)


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, ordered by rank, on every rank."""
    values = [value] * world_size()
    if is_distributed():
        _dist().all_gather_object(values, value)
    return values


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, ordered by rank, on every rank. All ranks pass the same shape."""
    if not is_distributed():
        return tensor
    rows = tensor.new_empty(world_size(), *tensor.shape)
    _dist().all_gather(list(rows), tensor.contiguous())
    return rows.flatten(0, 1)


def rank_zero_call(call: Callable[[], T]) -> T:
    """Run `call` on rank 0 and return its value, or raise its error, on every rank."""
    outcome = [None, None]  # the value, the error
    if is_main():
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = error
    if is_distributed():
        _dist().broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_same(name: str, value: Any) -> None:
    """Raise UserError if the ranks have different values, as with different code or configuration."""
    values = gather_objects(value)
    if odd := [index for index, other in enumerate(values) if other != values[0]]:
        raise UserError(
            f"{name}: ranks {odd} differ from rank 0 ({values[odd[0]]!r} against {values[0]!r}); "
            "start all ranks with one command, one code version and one set of files"
        )


def shutdown(*, failed: bool = False) -> bool:
    """Leave the process group and return whether there was one.

    Models wrapped for DDP must be freed before: otherwise gloo's threads sometimes abort the interpreter at exit (torch
    2.13 to 2.15). Callers drop their references, and this function collects the garbage. A failed rank with NCCL does
    not leave the group: leaving waits for peers, which may wait for this rank in a collective.
    """
    if not _has_group():
        return False
    gc.collect()
    if not (failed and "nccl" in str(_dist().get_backend_config())):
        _dist().destroy_process_group()
    return True
