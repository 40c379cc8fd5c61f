"""`begin` says what a system lacks, lets the C library keep freed memory, and counts what others use."""

import os
import resource
import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = """
import resource, torch
from utils.start import begin
begin(None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("settings", "keeps"), [({}, True), ({"MALLOC_MMAP_MAX_": "1000"}, False)])
def test_a_block_in_the_place_of_a_freed_one_costs_few_page_faults(settings, keeps):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | settings, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) < 20 * 2**26 / resource.getpagesize() / 2) is keeps


SPIN = "import time\nends = time.monotonic() + 20\nwhile time.monotonic() < ends: pass"
TELL = "import time, utils.start as own\nown.begin(None)\ntime.sleep(2)\nprint(own.cores_of_others())"


def test_cores_that_others_use_are_counted():
    core = str(min(os.sched_getaffinity(0)))
    with subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", SPIN]) as spinning:
        command = ["taskset", "-c", core, sys.executable, "-c", TELL]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        spinning.kill()
    assert 0.5 < float(found.stdout) <= 1.1


def test_another_system_is_told_what_is_needed():
    elsewhere = "import os, runpy\ndel os.sched_getaffinity\nrunpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", elsewhere], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Linux" in done.stderr and "WSL" in done.stderr and done.stderr.count("\n") == 1
