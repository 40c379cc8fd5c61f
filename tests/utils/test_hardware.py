"""The memory that a process may take: of the system, or of the groups that hold it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from utils import hardware
from utils.hardware import free_memory

GIB = 2**30
V2 = {"memory.max": 8 * GIB, "memory.current": 6 * GIB, "memory.stat": f"anon 1\ninactive_file {GIB}"}


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/", {}, 12),
        ("0::/job/step", {"job": V2}, 3),
        ("0::/job/step", {"job": V2, "job/step": V2 | {"memory.max": "max"}}, 3),
        ("0::/job", {"job": V2 | {"memory.max": GIB}}, 0),
    ],
)
def test_the_least_that_a_group_leaves(tmp_path, monkeypatch, groups, files, expected):
    for folder, content in files.items():
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in content.items():
            (tmp_path / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GIB))
    monkeypatch.setattr(hardware, "Path", lambda first, *parts: Path(tmp_path, first.lstrip("/"), *parts))
    assert free_memory() == expected * GIB
