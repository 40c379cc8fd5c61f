"""What this machine's processors can do, and the memory that a process may take."""

from collections.abc import Iterator
from pathlib import Path

import torch

# Of cgroups of version 2 and 1: the files of the limit and of what is used, and the part of memory.stat that gives way.
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def has_fast_bf16(device: str) -> bool:
    """Return whether this machine's CPU or GPU (`device`: cpu or cuda) multiplies bf16 faster than float32.

    Intel's CPUs with AMX have AVX-512's bf16, too, at half of float32's speed: a product of 2,048 x 2,048 takes 118 ms
    against 59. A virtual machine may hide AMX. AVX-512's float16 tells these CPUs from AMD's, whose bf16 is fast.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = torch.cpu.get_capabilities()
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and not found.get("avx512_fp16", False))


def free_memory() -> int:
    """Return the bytes that this process may still take: of the system, or of a container or job that holds it.

    Linux only. Source: proc(5), MemAvailable; cgroups(7), the limits of all groups that the process is in.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return max(0, min([free, *_free_of_groups()]))


def _free_of_groups() -> Iterator[int]:
    """Yield what each group above this process leaves it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used, gives_way = _CGROUPS[bool(controllers)]
        inner = Path("/sys/fs/cgroup", root, group.strip("/"))
        for folder in (inner, *inner.parents):
            try:
                most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
                parts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and a container does not see the groups around it
                continue
            if most != "max":
                yield int(most) - taken + int(parts.get(gives_way, 0))
