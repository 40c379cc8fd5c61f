"""/samples: pictures of two steps over each other."""

import numpy as np
import pytest
from PIL import Image

from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import HOSTILE, sees
from utils.io.files import read_json, write_json
from utils.record.run_index import RunIndex
from viewer.images import Shelf
from viewer.try_image import list_choices

PROMPTS = ["black", {"text": HOSTILE, "seed": 7, "negative": "blurry", "image_size_hw": [16, 24]}]


def write_samples(folder):
    """Write a run with pictures of two prompts, 32 x 40 and 16 x 24 pixels, before training and at two steps."""
    for name, prompts in {"other": PROMPTS[:1], "lora": PROMPTS}.items():
        run = make_run(folder / name)
        samples = {"prompts": prompts, "image_size_hw": [32, 40], "steps": 3, "guidance": 5.0}
        config = read_json(run / "config.json") | {"task": {"name": "diffusion", "samples": samples}}
        write_json(run / "config.json", config)
    for step in (0, 5, 9):
        strip = np.full((32, 64, 3), 10 * step, np.uint8)
        strip[:, 40:] += 100
        (run / f"plots/steps/{step:08}").mkdir(parents=True)
        Image.fromarray(strip).save(run / f"plots/steps/{step:08}/samples.png")


@pytest.fixture(scope="module")
def runs(folder):
    make_run(folder / "classifier")
    write_samples(folder)
    return folder


def test_two_steps_are_over_each_other_and_the_address_has_them(page, address, runs):
    page.goto(f"{address}/samples?run=0/classifier&run=0/lora&run=0/other")
    sees(page, HOSTILE)
    page.wait_for_function("document.activeElement.classList.contains('samples')")
    page.get_by_role("group", name="pictures").press("ArrowUp")
    page.wait_for_url("**left=0&right=1")
    page.reload()
    page.get_by_alt_text("right: lora, step 5").wait_for()
    page.get_by_label("wipe").fill("80")
    assert "80%" in page.locator(".samples").get_attribute("style")
    sees(page, "other is left out")
    page.get_by_role("button", name="Keep right").nth(1).click()
    sees(page, "Open them")
    (kept,) = runs.glob("pictures/chosen_lora/*_2.png")
    assert Image.open(kept).getpixel((23, 0)) == (150, 150, 150, 255) and Image.open(kept).width == 24


def test_what_draws_pictures_or_is_damaged_cannot_be_tried(runs):
    (make_run(runs / "damaged") / "config.json").write_text("{")
    assert list_choices(Shelf(RunIndex([runs]), None)) == [str(runs / "classifier")]
