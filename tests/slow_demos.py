"""Each script of demos/, with so few steps that its figures mean nothing."""

import json
import os
import re
import subprocess
import sys

import pytest

from bench import tiny_sdxl
from tests.in_process import draw_few_glyphs
from tests.support import ROOT, run

SHORT = ["loop.total_steps=2", "loop.batch_size=8", "runtime.threads=1"]
SDXL = [*SHORT, "loop.micro_batch_size=8", "task.chunk=8", "task.samples.steps=2"]
IMAGES = [*SHORT, "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]"]
LEFT = {  # what the last commands of a script need, and what a person looks at
    "images": ["tagger/export/wd14/README.md", "sdxl/plots/samples.png", "sdxl/export/single_file/model.safetensors"],
    "glyphs": ["train/plots/evaluate_confusion.png", "predictions.csv"],
    "fcmae": ["pretrain/plots/reconstructions.png", "finetune/result.json", "planned/plots/curves.png"],
    "tagger": ["tagger/plots/evaluate_pr_curves.png", "tagger/export/wd14/selected_tags.csv", "predictions.jsonl"],
    "sdxl": ["epsilon/plots/samples.png", "v_prediction/plots/samples.png", "lora/export/kohya/lora.safetensors"],
}


def list_commands(demo, images, folder):
    """Return the words of each command of a script. Its `python` notes them in place of running them."""
    python, noted = folder / "bin/python", folder / "noted.jsonl"
    python.parent.mkdir()
    note = f"import json, sys; print(json.dumps(sys.argv[1:]), file=open({str(noted)!r}, 'a'))"
    python.write_text(f"#!{sys.executable}\n{note}\n")
    python.chmod(0o755)
    variables = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "RUN": "run"}
    subprocess.run(["sh", ROOT / f"demos/{demo}.sh", images], cwd=folder, env=variables, check=True)
    return [json.loads(line) for line in noted.read_text().splitlines()]


def shorten(words):
    of_minutes = ("loop.minutes=", "schedule.warmup_steps=")
    short = [re.sub("^0.5$", "0.01", word) for word in words if not word.startswith(of_minutes)]
    if len(short) < len(words):
        short += SDXL if "finetune_sdxl.py" in words else IMAGES
    return [*short, "task.min_count=1"] if "task=tagging" in words else short


def draw_images(demo, folder):
    if demo == "images":
        tiny_sdxl.write_tagged(folder / "images")
    elif demo == "sdxl":
        tiny_sdxl.write_tones(folder / "tones")
        return folder / "tones/shapes"
    else:
        draw_few_glyphs(folder / "images")
    return folder / "images"


@pytest.mark.parametrize("demo", sorted(path.stem for path in (ROOT / "demos").iterdir()))
def test_a_demo_runs_through(demo, tmp_path, monkeypatch):
    if demo in ("images", "sdxl"):
        pytest.importorskip("diffusers", reason="make install-sdxl")
    monkeypatch.setattr(tiny_sdxl, "_EACH", 1)
    monkeypatch.setattr(tiny_sdxl, "_EACH_CAPTION", 4)
    monkeypatch.setattr(tiny_sdxl, "_TAGGED_EVERY", 2)
    for words in list_commands(demo, draw_images(demo, tmp_path), tmp_path):
        script, *short = shorten(words)
        run(script, short, tmp_path, variables={"CURVES": "drawn"})
    assert [name for name in LEFT[demo] if not (tmp_path / "run" / name).exists()] == []
    if demo == "images":
        assert [len([*(tmp_path / name).glob("*.txt")]) for name in ("run/images", "images")] == [80, 40]
