"""The capabilities of this machine: its processors, torch.compile, and the free memory."""

import os
import resource
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import psutil

from utils.errors import UserError
from utils.ranks import distributed
from utils.ranks.processes import count_cores

_MOST_WORKERS = 24  # per rank; more only take memory
_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # one exists if torch can see a GPU: of Linux, WSL 2, ROCm


def has_fast_bf16(device: str) -> bool:
    """Return whether this machine's `device` (cpu or cuda) multiplies bf16 faster than float32.

    On Intel CPUs whose AMX a virtual machine hides, bf16 by AVX-512 takes twice as long as float32 (2,048 x 2,048: 118
    against 59 ms). These CPUs also have float16 by AVX-512; AMD's CPUs, whose bf16 is fast, do not.
    """
    import torch  # not above: the free memory needs no torch

    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = torch.cpu.get_capabilities()
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and not found.get("avx512_fp16", False))


def choose_device(requested: str, key: str = "runtime.device") -> str:
    """Return cpu or cuda. Raises UserError (`key`) for cuda if neither this machine nor a planned job has a GPU."""
    if requested == "cpu":
        return requested
    if requested == "auto" and "torch" not in sys.modules and not any(map(os.path.exists, _GPUS)):
        return "cpu"  # known without torch
    import torch

    if requested == "cuda" and not torch.cuda.is_available() and not distributed.plans_gpus():
        raise UserError(f"{key}: cuda was requested, but torch sees no GPU; set {key}=auto or cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_workers(requested: str | int, device: str) -> int:
    """Return the loader processes per rank: a share of the cores, or 0 on a CPU, whose cores do the training."""
    if requested != "auto":
        return int(requested)
    if device == "cpu":
        return 0
    machine = os.cpu_count() or 1
    usable = count_cores()
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")  # 4(x2),3: two nodes with 4, one with 3
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or max(int(part.split("(")[0]) for part in tasks))
    # SLURM may already have bound each task to its own cores; the ranks of a launcher share theirs.
    divided = usable < machine and "LOCAL_WORLD_SIZE" not in os.environ
    return max(1, min(_MOST_WORKERS, (usable if divided else usable // local_size) - 1))


def choose_precision(requested: str, device: str) -> str:
    """Return the precision; auto: bf16 if the hardware multiplies it faster, else fp16 on a GPU and fp32 on a CPU.

    Raises UserError (`runtime.precision`) for fp16 on a CPU.
    """
    if requested == "fp16" and device == "cpu" and not distributed.plans_gpus():
        raise UserError("runtime.precision: fp16 is for GPUs; on a CPU set runtime.precision=bf16, fp32 or auto")
    if requested != "auto":
        return requested
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device == "cuda" else "fp32"


def missing_for_compile(device: str) -> list[str]:
    """Return what torch.compile needs but cannot find; searched as inductor (CPU) and Triton (GPU) do."""
    variable, known = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))
    compilers = os.environ.get(variable, "").split()[:1] or known  # flags may follow
    # The default scheme of Debian's Python names a folder in /usr/local without the headers.
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    missing = []
    if not any(map(shutil.which, compilers)):
        missing.append(f"a compiler on the PATH ({' or '.join(compilers)}; {variable} sets it)")
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        missing.append("Python's headers (Python.h, in the package python3-dev or python3-devel)")
    if device == "cuda" and find_spec("triton") is None:
        missing.append("the package triton")
    return missing


def check_compile(device: str) -> None:
    """Raise UserError (`runtime.compile`) if torch.compile is not possible here."""
    if missing := missing_for_compile(device):
        raise UserError(
            f"runtime.compile: true needs {' and '.join(missing)}, not found here; install that or set "
            "runtime.compile=auto"
        )


def free_memory() -> int:
    """Return the bytes that this process may still allocate, within the limits of its container or job.

    Source: cgroups(7), version 2.
    """
    free = psutil.virtual_memory().available
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        group = Path("/sys/fs/cgroup", line.rpartition(":")[2].strip("/"))
        for folder in (group, *group.parents):
            try:
                limit = (folder / "memory.max").read_text().strip()
                used = int((folder / "memory.current").read_text())
                parts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and a container does not see the groups around it
                continue
            if limit != "max":
                free = min(free, int(limit) - used + int(parts["inactive_file"]))
    return max(0, free)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had at once."""
    unit = 1 if sys.platform == "darwin" else 2**10  # getrusage(2)
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
