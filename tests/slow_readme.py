"""Commands of README and docs/commands.md run, in their order; those of other pages have a valid configuration."""

import re
import shlex
import shutil
from importlib.util import find_spec

import pytest
import torch

from bench.measure import read_group
from models.build import build_network
from models.config import ModelConfig
from tests.in_process import draw_few_glyphs
from tests.support import make_collection, run
from tests.test_readme import COMMANDS, DOCS, PAGES, SCRIPTS
from tests.utils.config.test_help import configure_line

# What a training command gets on top, so that it ends in seconds; everything else stays as a reader types it.
SHORT = [
    "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]",
    "loop.total_steps=2", "loop.batch_size=8", "runtime.threads=1",
]  # fmt: skip
SHORT_SDXL = [
    "model=sdxl_tiny", "task.buckets.areas_px=[16384]", "task.buckets.min_px=64", "task.buckets.max_px=256",
    "task.buckets.step_px=32", "loop.total_steps=2", "runtime.threads=1",
]  # fmt: skip

NEW_KIND = re.compile(r"=score\b|/score")  # docs/new_task.md makes it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a working folder that has a few glyphs and a collection named PATH."""
    path = tmp_path_factory.mktemp("readme")
    draw_few_glyphs(path / "collections/glyphs")
    make_collection(path / "PATH")
    shutil.copytree(path / "PATH/val", path / "PATH/test")
    return path


def make_released_file(path, num_classes):
    """Write an atto as the released files are laid out."""
    config = read_group(ModelConfig, "model", "convnextv2_atto", head_init_scale=1.0)
    torch.save({"model": build_network(config, num_classes).state_dict()}, path)


def test_every_python_command_runs_in_the_order_of_the_readme(folder):
    """Each stage takes what the one before it left; `init_from=RUN` takes the pretraining on the images in PATH."""
    for line in (line for line in COMMANDS if line.startswith("python ")):
        script, *arguments = shlex.split(line)[1:]
        if "init_from=FILE" in arguments:
            make_released_file(folder / "FILE", sum(path.is_dir() for path in (folder / "PATH/train").iterdir()))
            arguments += ["augment.image_size_hw=[32,32]", "runtime.threads=1"]
        elif script in ("train.py", "pretrain_fcmae.py", "finetune.py"):
            arguments = [*(word for word in arguments if not word.startswith("loop.minutes=")), *SHORT]
        if re.search("sdxl|vae", line) and find_spec("diffusers") is None:
            continue
        if script == "view.py":  # it would not end; tests/viewer/ runs it
            continue
        if script == "finetune_vae.py":
            arguments.append("task.crop_px=32")
        if script in ("finetune_sdxl.py", "finetune_vae.py"):
            arguments = [text for text in arguments if text != "model.path=BASE"] + SHORT_SDXL
        if "task=tagging" in arguments:
            arguments.append("task.min_count=1")  # of few images
        if script == "pretrain_fcmae.py" and "data.root=PATH" in arguments:
            arguments.append("run_dir=RUN")
        if "prompts=PROMPTS" in arguments:
            (folder / "PROMPTS").write_text("a cat")
            arguments += ["pictures.image_size_hw=[64,64]", "pictures.steps=2"]
        elif script == "predict.py":
            few = folder / "few"
            if not few.exists():
                shutil.copytree(folder / "PATH/train/A", few, ignore=shutil.ignore_patterns("*.txt"))
            arguments = [f"input={few}" if text.startswith("input=") else text for text in arguments]
        run(script, arguments, folder)
    written = ["outputs/first/finetune/export/model.onnx", "outputs/released/result.json", "PATH/manifest.parquet"]
    written += ["outputs/first/timm/model.safetensors", "outputs/sweeps/rates"]
    written += ["outputs/sdxl/pictures/00000-0.png"] if find_spec("diffusers") else []
    assert [name for name in written if not (folder / name).exists()] == []
    assert len((folder / "outputs/first/predictions.csv").read_text().splitlines()) > 10
    assert len(list((folder / "outputs/sweeps/rates").iterdir())) == 2


@pytest.mark.parametrize("page", sorted({*DOCS} - {*PAGES}), ids=lambda page: page.name)
def test_every_command_has_a_valid_configuration(page):
    """Lines of code blocks, without what explains them behind three spaces, and code in a sentence."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    scripts = rf"(?:python|torchrun [^`\n]*?) (?:{'|'.join(SCRIPTS)})\.py"
    lines = [re.split(r"   |  +#", line)[0] for line in re.findall(rf"^ *({scripts}.*)$", text, flags=re.MULTILINE)]
    for line in [*lines, *re.findall(rf"`({scripts}[^`\n]*)`", text)]:
        if not NEW_KIND.search(line) and "--help" not in line:
            configure_line(line)
