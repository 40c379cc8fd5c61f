"""Each recipe of conf/recipe, with so few steps that its figures mean nothing. A second call repeats none."""

import re

import pytest

from bench import tiny_sdxl
from tests.in_process import configure, draw_few_glyphs
from tests.support import run
from tests.test_workshop import read_pictures, work
from utils.config.help import list_options
from utils.io.files import read_json
from utils.record.figures import show_name
from workshop import Stage

SHORT = "loop.total_steps=2 loop.batch_size=8 runtime.threads=1"
SDXL = f"{SHORT} loop.micro_batch_size=8 task.chunk=8 task.samples.steps=2"
IMAGES = f"{SHORT} model=convnextv2_glyph model.depths=[1,1] model.dims=[8,16] augment.image_size_hw=[32,32]"
OF_DIFFUSERS = ("images", "demo_sdxl")
PICTURES = {
    "images": {"sdxl: samples.png", "pretrain: curves.png"},
    "demo": {"evaluate: evaluate_confusion.png"},
    "demo_fcmae": {"pretrain: reconstructions.png", "planned: curves.png"},
    "demo_tagger": {"calibrate: evaluate_pr_curves.png"},
    "demo_sdxl": {"epsilon: samples.png", "v_prediction: samples.png", "lora: samples.png"},
}


def shorten(command):
    """Return a stage's command with few steps."""
    words = command.replace("base 0.5 ", "base 0.01 ")
    words, is_training = re.subn(r"loop\.minutes=\S+", "", words)
    if is_training:
        words += f" {SDXL if 'finetune_sdxl.py' in words else IMAGES}"
    if "task=tagging" in words:
        words += " task.min_count=1"
    return words


def draw_images(recipe, folder):
    """Return the folder of a recipe's images."""
    if recipe == "images":
        tiny_sdxl.write_tagged(folder / "images")
    elif recipe == "demo_sdxl":
        tiny_sdxl.write_tones(folder / "tones")
        return folder / "tones/shapes"
    else:
        draw_few_glyphs(folder / "images")
    return folder / "images"


def test_each_recipe_has_a_row_above():
    assert {*list_options("recipe", "workshop")} == PICTURES.keys()


@pytest.mark.parametrize("recipe", PICTURES)
def test_a_recipe_runs_through_and_nothing_is_repeated(recipe, tmp_path, monkeypatch):
    if recipe in OF_DIFFUSERS:
        pytest.importorskip("diffusers", reason="make install-sdxl")
    monkeypatch.setattr(tiny_sdxl, "_EACH", 1)
    monkeypatch.setattr(tiny_sdxl, "_EACH_CAPTION", 4)
    monkeypatch.setattr(tiny_sdxl, "_TAGGED_EVERY", 2)

    def run_stage(name, words):  # in a fork: the imports of ten processes take longer than the stages
        run(words[0], words[1:], tmp_path, variables={"CURVES": "drawn"})
        return 0.5

    monkeypatch.setattr("workshop.run_stage", run_stage)
    words = [f"recipe={recipe}", f"data.root={draw_images(recipe, tmp_path)}"]
    stages = configure("workshop", words)[0].stages
    stages = {name: Stage(command=shorten(stage.command), leaves=stage.leaves) for name, stage in stages.items()}
    work(stages, tmp_path, *words)
    page = (tmp_path / "run/report.html").read_text()
    finished = read_json(tmp_path / "run/stages.json")
    assert [*finished] == [*stages] and {*map(show_name, PICTURES[recipe])} <= {*read_pictures(page)}
    if recipe == "images":
        assert "mAP" in page
        texts = [len(list((tmp_path / folder).glob("*.txt"))) for folder in ("run/images", "images")]
        assert texts == [80, 40]
    assert work(stages, tmp_path, *words) and read_json(tmp_path / "run/stages.json") == finished
