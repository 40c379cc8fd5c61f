"""The C library keeps freed memory in a command's process."""

import os
import resource
import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = """
import resource, torch
import utils.process_settings
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
