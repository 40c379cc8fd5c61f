"""The demo of SDXL as a user starts it, with two steps of each training: its exports draw what the runs drew."""

import json

import pytest
from PIL import Image

from tests.support import command

pytestmark = pytest.mark.slow


def test_the_demo_of_sdxl_runs_through(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "demo"
    words = [f"out={out}", "vae_steps=2", "loop.total_steps=2", "runtime.precision=fp32"]
    done = command("python", "bench/demo_sdxl.py", *words, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mean brightness" in done.stdout and "the run is complete: 2 of 2 steps" in done.stderr
    found = json.loads((out / "summary.json").read_text())
    assert set(found["differences"]) == {"diffusers", "single_file", "kohya"}
    assert max(found["differences"].values()) < 1.0  # of 255; a picture of the run is rounded
    assert set(found["epsilon"]["tones"]) == set(found["v_prediction"]["tones"]) > {"black", "white"}
    assert Image.open(out / "samples.png").width > Image.open(out / "samples.png").height
