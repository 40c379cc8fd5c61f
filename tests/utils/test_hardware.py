"""The memory that a process may take, of the system or of the groups that hold it; and that it keeps."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from utils import hardware
from utils.hardware import free_memory

GIB = 2**30
V2 = {"memory.max": 8 * GIB, "memory.current": 6 * GIB, "memory.stat": f"anon 1\ninactive_file {GIB}"}
V1 = {"memory.limit_in_bytes": 5 * GIB, "memory.usage_in_bytes": 4 * GIB, "memory.stat": "total_inactive_file 0"}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 12),
        ("0::/job/step", {"job": V2}, 3),
        ("0::/job/step", {"job": V2, "job/step": V2 | {"memory.max": "max"}}, 3),
        ("3:cpu:/a\n2:memory:/job", {"memory/job": V1}, 1),
        ("0::/job", {"job": V2 | {"memory.max": GIB}}, 0),
    ],
)
def test_the_least_that_a_group_leaves(tmp_path, monkeypatch, groups, files, expected):
    for folder, content in files.items():
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in content.items():
            (tmp_path / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {12 * 2**20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    monkeypatch.setattr(hardware, "Path", lambda first, *parts: Path(tmp_path, first.lstrip("/"), *parts))
    assert free_memory() == expected * GIB


# In a process of its own: the heap of this one has holes that nobody has touched yet.
FAULTS = """
import resource, torch
from utils.hardware import keep_freed_memory
keep_freed_memory()
torch.zeros(2**24)  # 64 MiB are 16,384 pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_large_tensor_takes_the_memory_of_the_one_before():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000
