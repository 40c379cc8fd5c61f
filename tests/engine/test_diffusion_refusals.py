"""What users give to finetune_sdxl.py that is wrong or odd: the message and the exit status, or the warning by name."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from tests.in_process import run, run_command
from tests.support import TINY, make_collection
from utils.errors import UserError

SHORT = [
    *TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=1",
    "loop.global_batch_size=4", "data.root=images",
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    make_collection(tmp_path / "images", per_class=3, validation=1)
    return tmp_path


def train(place, *overrides, run_dir="run"):
    """Train one step; return the run's log."""
    run("finetune_sdxl", [*SHORT, f"run_dir={run_dir}", *overrides], place)
    return (place / run_dir / "log.txt").read_text()


def refused(place, monkeypatch, capsys, *overrides):
    """Return the message of a command that ends with status 2 and leaves no run."""
    assert run_command("finetune_sdxl", [*SHORT, "run_dir=run", *overrides], place, monkeypatch) == 2
    assert not (place / "run/checkpoints").exists()
    return capsys.readouterr().err


def test_a_caption_in_a_wrong_encoding(place, monkeypatch, capsys):
    (place / "images/train/A/000.txt").write_bytes(b"caf\xe9, night")
    said = refused(place, monkeypatch, capsys)
    assert "data.root" in said and "train/A/000.txt" in said and "UTF-8" in said


def test_empty_captions_are_named_and_a_collection_without_any_is_refused(place, monkeypatch, capsys):
    (place / "images/train/A/001.txt").write_text(" \n")
    said = train(place)
    assert "train/A/001.png" in said.partition("WARNING captions: 1 images have neither a caption")[2]
    shutil.rmtree(place / "run")
    for file in (place / "images").rglob("*.txt"):
        file.unlink()
    assert "data.root: none of the 9 images" in refused(place, monkeypatch, capsys)


def test_images_of_odd_shapes_and_modes(place):
    """A line of 1 x 4000 px, an image smaller than any bucket, and CMYK."""
    folder = place / "images/train/A"
    for name, image in {
        "line": Image.new("RGB", (4000, 1)),
        "speck": Image.new("RGB", (5, 5)),
        "ink": Image.fromarray(np.full((64, 64, 4), 40, np.uint8), mode="CMYK"),
    }.items():
        image.save(folder / f"{name}.{'jpg' if name == 'ink' else 'png'}")
        (folder / f"{name}.txt").write_text(name)
    untrained = {
        "drop": ("too small (task.buckets.small=drop", ["line", "speck"]),
        "native": ("too small (task.buckets.small=native", ["line", "speck"]),  # a side of 0 px
        "keep": ("of a shape too far from any bucket (task.buckets.max_crop=0.2)", ["line"]),  # the speck is enlarged
    }
    for small, (reason, names) in untrained.items():
        said = train(place, f"task.buckets.small={small}", run_dir=small)
        (warning,) = (line for line in said.splitlines() if "are not trained on" in line)
        assert f"{len(names)} images" in warning and reason in warning
        assert all(f"train/A/{name}.png" in warning for name in names) and ("speck" in warning) == ("speck" in names)
        assert "ink.jpg" not in said and not (place / small / "unreadable.jsonl").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["task.buckets.sizes_hw=[[512,512]]", "task.buckets.small=drop"], "buckets: none of 9 images has a bucket"),
        (["model.path=sd15.safetensors"], "is a checkpoint of Stable Diffusion 1 or 2"),
        (["loop.sampling=balanced"], "loop.sampling: balanced"),
        (["data.cache.disk_gib=1", "task.latent_cache=latents"], "data.cache.disk_gib: 1"),
        (["task.noise.prediction_type=epsilon"], "task.noise.prediction_type: epsilon"),
    ],
)
def test_what_is_refused(words, said, place, monkeypatch, capsys):
    save_file({"cond_stage_model.transformer.x": torch.zeros(1)}, place / "sd15.safetensors")
    assert said in refused(place, monkeypatch, capsys, *words)


def test_a_run_is_evaluated_and_not_predicted_from(place):
    train(place)
    found = run("evaluate", ["run_dir=run", "runtime.device=cpu", "runtime.threads=1"], place)
    assert "loss" in found and (place / "run/metrics.jsonl").exists()
    assert run("export", ["run_dir=run", "format=kohya", "dry_run=true"], place) == "dry run: nothing is written"
    with pytest.raises(UserError, match="^weights: .*diffusion"):
        run("predict", ["weights=run", "input=images", "output=found.csv"], place)
