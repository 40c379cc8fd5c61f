"""The demo of SDXL, with two steps of each training: its exports draw what the runs drew. Its stages are forks."""

import json
import sys
from contextlib import contextmanager

import pytest
from PIL import Image

from tests.support import ROOT, command, fork_command, start

pytestmark = pytest.mark.slow


def test_the_demo_of_sdxl_runs_through(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from bench import demo_sdxl

    out, said = tmp_path / "demo", []

    def run_stage(name, arguments):
        done = fork_command(*arguments)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        said.append(done.stderr)
        return 1.0

    @contextmanager
    def beside(name, out, *arguments):
        started = start(arguments[0], arguments[1:], ROOT, outputs=[tmp_path / f"{name}.txt"] * 2)
        yield
        assert started.wait() == [0], started.output

    monkeypatch.setattr(demo_sdxl, "run_stage", run_stage)
    monkeypatch.setattr(demo_sdxl, "beside", beside)
    words = [f"out={out}", "vae_steps=2", "loop.total_steps=2", "runtime.precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["bench/demo_sdxl.py", *words])
    demo_sdxl.main()
    assert "mean brightness" in capsys.readouterr().out and "the run is complete: 2 of 2 steps" in said[-1]
    found = json.loads((out / "summary.json").read_text())
    assert set(found["differences"]) == {"diffusers", "single_file", "kohya"}
    assert max(found["differences"].values()) < 1.0  # of 255; a picture of the run is rounded
    assert set(found["epsilon"]["tones"]) == set(found["v_prediction"]["tones"]) > {"black", "white"}
    assert Image.open(out / "samples.png").width > Image.open(out / "samples.png").height


def test_the_demo_starts_by_itself_and_refuses_other_words():
    pytest.importorskip("diffusers")
    done = command("python", "bench/demo_sdxl.py", "ful")
    assert done.returncode == 1 and "'ful' is neither full nor KEY=VALUE" in done.stderr
