"""Real steps on CUDA tensors that do not exist (tests/fake_cuda.py): no wrong device or dtype, and no host read within
a step, a measure or a change of images. Planted faults are found. Other cases: slow_fake_cuda.py.
"""

import json
import shutil

import pytest

from tests.support import ROOT, command

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc) for the shim")


def run_cases(*cases):
    """Run cases in one process of their own; returns a row for each."""
    done = command("python", ROOT / "tests/fake_cuda.py", *cases, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == list(cases)
    return rows


def check(rows):
    wrong = [row for row in rows if row["error"] or row["waits"]]
    assert not wrong, json.dumps(wrong, indent=1)


def test_planted_faults_are_found_and_tasks_run():
    cases = [f"{task}:adamw:bf16" for task in ("classification", "fcmae", "tagging")]
    rows = run_cases("faults", "images", *cases, "classification:muon:bf16")
    check(rows)
    # A classifier copies no map to another dtype or layout. FCMAE does, so the copies are counted.
    assert rows[2]["map_copies"] == 0 < rows[3]["map_copies"]
