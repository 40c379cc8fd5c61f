"""README: every command in it runs, and every file that it names is there. Refusals if one is neither run nor known."""

import json
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from bench import demo
from bench.measure import read_group
from models.build import build_network
from models.config import ModelConfig
from tests.support import ROOT, make_collection, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
# What a training command gets on top, so that it ends in seconds; everything else stays as a reader types it.
SHORT = [
    "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]",
    "loop.total_steps=2", "loop.global_batch_size=8", "runtime.threads=1",
]  # fmt: skip
SHORT_SDXL = [
    "model=sdxl_tiny", "task.buckets.area_px=16384", "task.buckets.min_px=64", "task.buckets.max_px=256",
    "task.buckets.step_px=32", "loop.total_steps=2", "runtime.threads=1",
]  # fmt: skip
MAKE = {
    "install", "install-sdxl", "install-care", "install-cloud", "install-interop", "demo", "demo-full", "demo-tagger",
    "demo-sdxl", "test", "test-slow", "test-slurm", "lint", "bench", "bench-gpu", "simd", "clean",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a working folder that has the glyphs (drawn once, in the repository) and a collection named PATH."""
    path = tmp_path_factory.mktemp("readme")
    (ROOT / "collections").mkdir(exist_ok=True)
    (path / "collections").symlink_to(ROOT / "collections")
    make_collection(path / "PATH")
    return path


def test_the_readme_has_the_commands_that_are_tested_below():
    scripts = {shlex.split(line)[1] for line in COMMANDS if line.startswith("python ")}
    root_scripts = ("prepare", "train", "pretrain_fcmae", "finetune", "finetune_sdxl", "evaluate", "export", "predict")
    assert scripts == {f"{name}.py" for name in (*root_scripts, "submit/slurm")}
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} == MAKE
    assert len(COMMANDS) == 47


def make_released_file(path, num_classes):
    """Write an atto as the released files are laid out."""
    config = read_group(ModelConfig, "model", "convnextv2_atto", head_init_scale=1.0)
    torch.save({"model": build_network(config, num_classes).state_dict()}, path)


@pytest.mark.slow
def test_every_python_command_runs_in_the_order_of_the_readme(folder):
    """Each stage takes what the one before it left; `init_from=RUN` takes the pretraining on the images in PATH."""
    for line in (line for line in COMMANDS if line.startswith("python ")):
        script, *arguments = shlex.split(line)[1:]
        if "init_from=FILE" in arguments:
            make_released_file(folder / "FILE", sum(path.is_dir() for path in (folder / "PATH/train").iterdir()))
            arguments += ["augment.image_size_hw=[32,32]", "runtime.threads=1"]
        elif script in ("train.py", "pretrain_fcmae.py", "finetune.py"):
            arguments += SHORT
        if "sdxl" in line and find_spec("diffusers") is None:
            continue
        if script == "finetune_sdxl.py":
            arguments = [text for text in arguments if text != "model.path=BASE"] + SHORT_SDXL
        if "task=tagging" in arguments:
            arguments.append("task.min_count=1")  # of few images
        if script == "pretrain_fcmae.py" and "data.root=PATH" in arguments:
            arguments.append("run_dir=RUN")
        if script == "predict.py":
            few = folder / "few"
            if not few.exists():
                shutil.copytree(folder / "PATH/train/A", few, ignore=shutil.ignore_patterns("*.txt"))
            arguments = [f"input={few}" if text.startswith("input=") else text for text in arguments]
        run(script, arguments, folder)
    assert (folder / "outputs/first/finetune/export/model.onnx").exists()
    assert (folder / "outputs/released/result.json").exists()
    assert (folder / "outputs/first/timm/model.safetensors").exists()
    assert (folder / "outputs/first/finetune/export/transformers/preprocessor_config.json").exists()
    assert len((folder / "outputs/first/predictions.csv").read_text().splitlines()) > 10
    assert (folder / "PATH/manifest.parquet").exists()
    assert find_spec("diffusers") is None or (folder / "outputs/sdxl/export/kohya/lora.safetensors").exists()
    assert len(list((folder / "outputs/sweeps/rates").iterdir())) == 2


def test_the_torchrun_command_is_the_one_that_is_tested():
    """It runs in tests/distributed/test_launch.py."""
    line = next(line for line in COMMANDS if line.startswith("torchrun"))
    source = (ROOT / "tests/distributed/test_launch.py").read_text()
    assert all(f'"{word}"' in source or word in ("torchrun", "finetune.py") for word in shlex.split(line))


@pytest.mark.parametrize("target", sorted(MAKE))
def test_every_make_target_is_there(target):
    """make accepts a phony target without a rule, too: it has nothing to do then."""
    assert re.search(rf"^{target}:( .+|\n\t)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def few_glyphs(root):
    """Copy some glyphs of a training and the validation typefaces into a collection that passes for the whole."""
    source = ROOT / "collections/glyphs"
    table = pq.read_table(source / "manifest.parquet")
    wanted = re.compile(r"images/(DejaVuSans|DejaVuSerif|DejaVuSans-Bold|STIXGeneral)/U\+004\d\.png")
    rows = [number for number, path in enumerate(table["path"].to_pylist()) if wanted.fullmatch(path)]
    for path in table["path"].take(rows).to_pylist():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, root / path)
    pq.write_table(table.take(rows), root / "manifest.parquet")
    shutil.copy(source / "glyphs.json", root)
    return root


@pytest.mark.slow
def test_the_full_demo_runs_through(folder, tmp_path, monkeypatch, capsys):
    """`make demo-full` without its installation, on few glyphs and two updates; table and summary come out whole."""
    out = tmp_path / "demo"
    stages = []

    def run_stage(name, arguments):
        stages.append(name)
        run(arguments[0], arguments[1:], folder, draws=True)
        return 1.0

    monkeypatch.setattr(demo, "run_stage", run_stage)
    root = few_glyphs(tmp_path / "glyphs")
    monkeypatch.setattr(sys, "argv", ["demo.py", "full", f"out={out}", *SHORT, f"data.root={root}"])
    demo.main()
    text = capsys.readouterr().out
    for words in ("pretraining loss", "top-1 on an unseen typeface", "ONNX against PyTorch", "all stages", "one face"):
        assert words in text
    pictures = re.findall(r"^picture +(\S+)$", text, flags=re.MULTILINE)
    assert len(pictures) == 5 and all(Path(path).is_file() for path in pictures)
    summary = json.loads((out / "summary.json").read_text())
    assert stages == ["glyphs", "pretrain", "finetune", "evaluate", "export", "predict", "all_labels", "scratch"]
    waits = {"wait_for_resnet18", "wait_for_all_labels_resnet18"}
    assert set(summary["seconds"]) == {*stages, *waits} and all(summary["seconds"][name] == 1.0 for name in stages)
    losses, seconds = ("pretrain_loss_first", "pretrain_loss_last"), ("training_seconds", "training_seconds_resnet18")
    figures = (*losses, "top1", "top1_resnet18", *seconds, "onnx_max_abs_diff", *demo.CONTROLS)
    assert set(summary) == {*figures, "seconds"} and all(type(summary[name]) is float for name in figures)
    runs = {  # whether it is pretrained, and has the labels of one face only
        "finetune": (True, True), "resnet18": (False, True), "scratch": (False, True),
        "all_labels": (True, False), "all_labels_resnet18": (False, False),
    }  # fmt: skip
    for name, expected in runs.items():
        config, said = (json.loads((out / name / "config.json").read_text()), (out / name / "log.txt").read_text())
        few = re.search(r"loop.train_paths: 10 of 30 training images", said) is not None
        assert (config["init_from"] is not None, few) == expected
        assert config["script"] == ("train" if "resnet18" in name else "finetune")


def test_a_stage_that_fails_ends_the_demo():
    with pytest.raises(SystemExit, match="demo: finetune ended with status 2"):
        demo.run_stage("finetune", ["-c", "raise SystemExit(2)"])
    assert demo.run_stage("nothing", ["-c", "pass"]) >= 0


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links
