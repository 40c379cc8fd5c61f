"""/samples: pictures of two steps over each other, and choices that are kept with their pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support import rows
from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import HOSTILE, assert_accessible, assert_fits, sees
from utils.io.files import read_json

PROMPTS = ["black", {"text": HOSTILE, "seed": 7, "negative": "blurry", "image_size_hw": [16, 24]}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with pictures of two prompts, 32 x 40 and 16 x 24 pixels, before training and at two steps."""
    root = tmp_path_factory.mktemp("samples")
    make_run(root / "classifier")
    for name, prompts in {"other": PROMPTS[:1], "lora": PROMPTS}.items():
        run = make_run(root / name)
        samples = {"prompts": prompts, "image_size_hw": [32, 40], "steps": 3, "guidance": 5.0}
        config = read_json(run / "config.json") | {"task": {"name": "diffusion", "samples": samples}}
        (run / "config.json").write_text(json.dumps(config))
    for step in (0, 5, 9):
        strip = np.full((32, 64, 3), 10 * step, np.uint8)
        strip[:, 40:] += 100
        (run / f"plots/steps/{step:08}").mkdir(parents=True)
        Image.fromarray(strip).save(run / f"plots/steps/{step:08}/samples.png")
    return root


def test_choices_are_kept_and_taken_back(page, address, runs):
    page.goto(f"{address}/samples?run=0/classifier&run=0/lora&run=0/other")
    group = page.get_by_role("group", name="pictures")
    page.wait_for_function("document.activeElement.classList.contains('samples')")
    group.press("ArrowRight")
    page.get_by_role("button", name=HOSTILE).and_(page.locator("[aria-pressed=true]")).wait_for()
    group.press("ArrowUp")
    page.wait_for_url("**left=0&right=1&here=1")
    page.reload()
    page.locator("[aria-pressed=true]", has_text=HOSTILE).wait_for()
    for key, count in {"2": 1, "0": 2, "1": 3}.items():
        group.press(key), group.press(key)  # once more is the same choice
        sees(page, f"choices to undo: {count}")
    page.get_by_role("button", name="U undo").click()
    sees(page, "choices to undo: 2")
    group.press("u")
    sees(page, "choices to undo: 1")
    (right,) = rows(runs / "lora/preferences.jsonl")
    assert right.items() >= {"prompt": HOSTILE, "negative": "blurry", "seed": 7, "tie": False}.items()
    files = [runs / "lora" / right[name] for name in ("chosen", "rejected")]
    pictures = [np.array(Image.open(file)) for file in files]
    assert [(each.shape, *np.unique(each)) for each in pictures] == [((16, 24, 3), 150), ((16, 24, 3), 100)]
    kept = {file for file in (runs / "lora/preferences").rglob("*") if file.is_file()}
    assert kept == {*files, files[0].with_suffix(".txt")}, "of the choice that counts alone"
    page.get_by_label("wipe").fill("80")
    assert "80%" in page.locator(".samples").get_attribute("style")
    sees(page, "0/other is left out")
    assert_fits(page)
    assert_accessible(page)
