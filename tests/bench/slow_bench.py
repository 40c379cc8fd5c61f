"""The benches as a user starts them: each ends by itself. Their figures mean nothing here.

`python bench/gpu.py quick` rehearses all parts, in four minutes.
"""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import gpu
from tests.in_process import SMALL_MODEL, make_images
from tests.support import run

REHEARSED = ["a minute", "fine-tuning, tiny", "tests", "SDXL, step", "images cut on the device", "SDXL, memory, 24 GB"]


def test_a_bench_prints_a_table_of_ratios(tmp_path):
    assert "ratio (least to greatest)\n" in run("bench/step_overhead.py", ["quick"], tmp_path)


def test_without_a_gpu_parts_of_bench_gpu_can_be_rehearsed(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    start = subprocess.Popen

    def fork(words, **rest):  # from a process that has the imports
        if not words[1].startswith("bench/"):
            return start(words, **rest)
        return SimpleNamespace(stdout=run(words[1], words[2:], tmp_path).splitlines(), wait=lambda: 0)

    monkeypatch.setattr(gpu, "PARTS", {name: gpu.PARTS[name] for name in REHEARSED})
    monkeypatch.setattr(subprocess, "Popen", fork)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "quick", f"journal={tmp_path / 'gpu.jsonl'}"])
    gpu.main()
    rows = gpu.Journal(tmp_path / "gpu.jsonl", {}).rows()
    assert {row["part"] for row in rows if row["state"] == "measured"} == {*REHEARSED}


def test_the_loader_bench_ends_with_the_settings_to_type(tmp_path):
    words = [*SMALL_MODEL, "augment=glyphs", f"data.root={make_images(tmp_path / 'images')}"]
    last = run("bench/loader.py", ["quick", *words], tmp_path).splitlines()[-1]
    assert re.fullmatch(r"runtime\.workers=\d+ augment\.on_device=(true|false)", last)
