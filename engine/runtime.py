"""Probe the machine and decide what `auto` means on it."""

import math
import os
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.config import MachineConfig, RuntimeConfig
from utils.errors import UserError
from utils.hardware import has_fast_bf16
from utils.ranks import distributed
from utils.ranks.processes import count_cores
from utils.record.logging import setup_logging

# By device, where runtime.compile=auto compiles at all. GPU, estimated: one to two minutes save 10 to 20 ms of a step.
# On a CPU it saves a third of a step with some networks and costs a tenth with others (docs/benchmarks.md).
COMPILE_PAYS_AFTER_STEPS = {"cuda": 3000}
# Of a training loop and of an evaluation, per worker process.
_EVALUATION_PREFETCH = 2
# Loader processes that still speed up a rank; more only take memory.
_MOST_WORKERS = 24
# The watchdog names a rank that hangs; the time-out of the process group is a second line of defence.
_GROUP_PATIENCE = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The choices: device, precision of the forward pass, memory format, and loader processes of this rank."""

    device: torch.device
    precision: str
    channels_last: bool
    workers: int
    prefetch_batches: int

    def autocast(self) -> AbstractContextManager:
        """Return the context of the forward pass; a new one each time."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def as_trained(self, precision: str | None) -> "Runtime":
        """Return this with a run's precision, so that both measure the same; fp16 becomes fp32 on a CPU."""
        precision = "fp32" if precision == "fp16" and self.device.type == "cpu" else precision
        return replace(self, precision=precision) if precision in _DTYPES else self

    def describe(self) -> str:
        """Return the choices in one line."""
        return (
            f"device={self.device} precision={self.precision} "
            f"channels_last={self.channels_last} workers={self.workers} threads={torch.get_num_threads()}"
        )


def choose_device(wanted: str, key: str = "runtime.device") -> str:
    """Return cpu or cuda. Raises UserError (`key`) for cuda where there is none, here or in a planned job."""
    if wanted == "cuda" and not torch.cuda.is_available() and not distributed.plans_gpus():
        raise UserError(f"{key}: cuda was requested and torch sees no GPU; set {key}=auto or cpu")
    if wanted == "cpu":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_precision(wanted: str, device: str) -> str:
    """Return bf16 where the hardware multiplies it faster, else float32; fp16 only when asked for."""
    if wanted == "fp16" and device == "cpu" and not distributed.plans_gpus():
        raise UserError("runtime.precision: fp16 is for GPUs; on a CPU set runtime.precision=bf16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device == "cuda" else "fp32"


def missing_for_compile(device: str) -> list[str]:
    """Return what torch.compile needs and does not find, searched where inductor (CPU) and Triton (GPU) search."""
    on_cpu = ("CXX", ("clang++" if sys.platform == "darwin" else "g++",))
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else on_cpu
    compilers = os.environ.get(variable, "").split()[:1] or known  # flags may follow
    # A Debian Python's own scheme names a folder of /usr/local, where its headers are not.
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    needed = {
        f"a compiler on the PATH ({' or '.join(compilers)}, as {variable} says)": any(map(shutil.which, compilers)),
        "Python's headers (Python.h, of the package python3-dev or python3-devel)": any(
            Path(folder, "Python.h").is_file() for folder in folders
        ),
        "the package triton": device != "cuda" or find_spec("triton") is not None,
    }
    return [name for name, is_there in needed.items() if not is_there]


def choose_compile(config: RuntimeConfig, device: str, total_steps: int) -> bool:
    """Return whether to compile: on a GPU, where it is possible and the run is long enough to pay for it.

    Raises UserError where it was requested and is not possible.
    """
    if config.compile is True and (missing := missing_for_compile(device)):
        raise UserError(
            f"runtime.compile: true needs {' and '.join(missing)}, not found here; install that or set "
            "runtime.compile=auto"
        )
    if config.compile != "auto":
        return config.compile
    pays = total_steps >= COMPILE_PAYS_AFTER_STEPS.get(device, math.inf)
    return pays and not config.deterministic and not missing_for_compile(device)


def choose_workers(wanted: str | int, device: str) -> int:
    """Return loader processes per rank: a share of the cores, none on a CPU, where training needs them itself."""
    if wanted != "auto":
        return int(wanted)
    if device == "cpu":
        return 0
    machine = os.cpu_count() or 1
    usable = count_cores()
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")  # 4(x2),3: two nodes with 4, one with 3
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or max(int(part.split("(")[0]) for part in tasks))
    # SLURM, where it binds each task to its own cores, has already divided them; the ranks of a launcher share theirs.
    divided = usable < machine and "LOCAL_WORLD_SIZE" not in os.environ
    return max(1, min(_MOST_WORKERS, (usable if divided else usable // local_size) - 1))


def start_machine(config: MachineConfig) -> Runtime:
    """Join the ranks and decide what `auto` means on this machine."""
    world = distributed.init_process_group(choose_device(config.device), _GROUP_PATIENCE * config.hang_timeout_sec)
    setup_logging(world.rank, explain=isinstance(config, RuntimeConfig) and config.explain)
    return choose_runtime(config)


def _set_backends(config: MachineConfig, device: str) -> None:
    """Set determinism and float32 matrix products of this process explicitly: a notebook runs several in one.

    TF32 is off where float32 is meant as a reference (`precision: fp32` stated) or the run is deterministic.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    if device != "cuda":
        return
    # torch reads this once, before the first deterministic matrix product of the process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not config.deterministic
    precision = "ieee" if config.deterministic or config.precision == "fp32" else "tf32"
    # Not matmul.fp32_precision: after it, the older names, which libraries read, raise.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.conv.fp32_precision = precision


def choose_runtime(config: MachineConfig) -> Runtime:
    """Decide for this machine, apply thread counts and determinism, and return the choices.

    Raises UserError where a request cannot be met here.
    """
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _set_backends(config, device)
    return Runtime(
        device=torch.device("cuda", distributed.local_device_index()) if device == "cuda" else torch.device("cpu"),
        precision=_choose_precision(config.precision, device),
        channels_last=config.channels_last if config.channels_last != "auto" else device == "cuda",
        workers=choose_workers(config.workers, device),
        prefetch_batches=config.prefetch_batches if isinstance(config, RuntimeConfig) else _EVALUATION_PREFETCH,
    )
