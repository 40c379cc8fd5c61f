"""The capabilities of this machine's processors, and the free memory."""

from pathlib import Path

import torch


def has_fast_bf16(device: str) -> bool:
    """Return whether this machine's `device` (cpu or cuda) multiplies bf16 faster than float32.

    On Intel CPUs whose AMX a virtual machine hides, bf16 by AVX-512 takes twice as long as float32 (2,048 x 2,048: 118
    against 59 ms). These CPUs also have float16 by AVX-512; AMD's CPUs, whose bf16 is fast, do not.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = torch.cpu.get_capabilities()
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and not found.get("avx512_fp16", False))


def free_memory() -> int:
    """Return the bytes that this process may still allocate, within the limits of its container or job.

    Linux only. Source: proc(5), MemAvailable; cgroups(7), version 2.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        group = Path("/sys/fs/cgroup", line.rpartition(":")[2].strip("/"))
        for folder in (group, *group.parents):
            try:
                limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
                parts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and a container does not see the groups around it
                continue
            if limit != "max":
                free = min(free, int(limit) - used + int(parts["inactive_file"]))
    return max(0, free)
