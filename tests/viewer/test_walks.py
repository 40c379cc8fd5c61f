"""From a folder to a network that its owner trusts, with the clicks and keys of a person (docs/viewer.md)."""

import random

import pytest
from PIL import Image, ImageOps

from tests.support import draw_shape, rows
from tests.viewer.conftest import draw_for_docs, press, sees
from utils.io.files import read_json

COLOURS = ["blue", "green", "red", "white", "yellow"]
HELPS_MOST = "document.querySelector('.stage[data-drawn=true]') && document.querySelector('.screen-title').textContent"


def draw_pictures(folder, count, wrong=()):
    """Draw squares on five colours, in folders of these names. wrong: numbers of pictures in the folder of another."""
    draw = random.Random(count)
    for number in range(count):
        place = folder / COLOURS[(number + (number in wrong)) % 5]
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(draw_shape("A", draw)).convert("L")
        ImageOps.colorize(grey, "black", COLOURS[number % 5]).save(place / f"{number % 5 + 1}picture{number}.png")
    return sorted(folder.rglob("*.png"))


def walk(page, steps, files=()):
    """Do what lines say: keys, a text to type, files to choose, a card to start, links of what ends, or other roles."""
    for line in steps.splitlines():
        kind, _, name = line.partition(" ")
        if kind == "press":
            press(page, name)
        elif kind == "type":
            page.keyboard.type(name)
        elif kind == "choose":
            with page.expect_file_chooser() as chooser:
                page.get_by_text(name, exact=True).click()
            chooser.value.set_files(files)
        elif kind == "start":
            card = page.get_by_role("region", name=name, exact=True)
            card.wait_for()
            for slider in card.get_by_role("slider").all():
                slider.press("Home")
            card.get_by_role("button").last.click()
        elif kind == "ended":
            page.locator(".job:not(.good)").wait_for()
            page.locator(".job.good:last-child").get_by_role("link", name=name).click()
        else:
            page.get_by_role(kind, name=name).last.click()


@pytest.fixture(scope="module")
def words(folder):
    return [f"runs={folder}"]


def test_pictures_without_labels_become_an_export(walker, address, folder):
    walker.goto(address)
    walk(walker, "choose Choose pictures\nlink Label", draw_pictures(folder / "old", 300))
    for name in COLOURS:
        walk(walker, f"textbox A class\ntype {name}")
        walker.keyboard.press("Enter"), sees(walker, f"{name} ")
    walker.keyboard.press("Escape")
    for number in range(1, 26):  # the names of the pictures begin with their keys
        press(walker, walker.wait_for_function(HELPS_MOST).json_value()[0])
        sees(walker, f"{number} of 300 labelled")
    sees(walker, "of the rest")
    draw_for_docs(walker, "label")
    draw_for_docs(walker, "label_phone", 390, 844)
    walk(walker, "press 0" + "\npress a\npress Enter" * 14)
    sees(walker, "All 300 images are decided")
    walk(walker, "link Train\nstart Train\nended See the run")
    draw_for_docs(walker, "viewer_run_light", height=560)
    figure = walker.locator(".front-big", has_text="%").inner_text(timeout=20_000)
    (result,) = folder.glob("*/result.json")
    assert float(figure.split()[0]) == pytest.approx(100 * read_json(result)["value"], abs=0.51)
    walk(walker, "link Try a picture\nchoose Drop, paste or choose images", draw_pictures(folder / "new", 5))
    walker.get_by_text("as the network sees it").nth(4).wait_for()
    walker.go_back()
    walk(walker, "button Export (ONNX)\nended See the run")
    with walker.expect_download() as saved:
        walk(walker, "link Download model.onnx")
    output, *_ = pytest.importorskip("onnxruntime").InferenceSession(saved.value.path()).get_outputs()
    assert output.shape[1] == len(COLOURS)


def test_wrong_labels_are_found_mended_and_the_gain_is_measured(walker, address, folder):
    wrong = [1, 27, 53, 74, 95]
    draw_pictures(folder / "colours", 100, wrong)
    walker.goto(address)
    walk(
        walker, f"button Browse\nbutton {folder}\nbutton colours\nlink Open this folder\nstart Train\nended See the run"
    )
    walker.go_back()
    walk(walker, "start Find wrong labels\nended Review them" + "\npress Enter" * 5 + "\nlink Train")
    mended = [f"{row['was']} {row['now']}" for row in rows(folder / "colours/corrections.jsonl")]
    assert {*mended} == {f"{COLOURS[(number + 1) % 5]} {COLOURS[number % 5]}" for number in wrong}
    walk(walker, "start Train\nended See the run\nlink Compare with\nbutton Measure both")
    sees(walker, "images that both have measured", "McNemar's exact test")
    draw_for_docs(walker, "viewer_compare_dark", height=560, scheme="dark")


def test_photographs_become_pictures_of_a_prompt(walker, address, folder):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    from tests.small_sdxl import write_base

    walker.goto(address)
    base = write_base(folder / "base")
    steps = f"choose Choose pictures\ntextbox File or folder of SDXL\ntype {base}\ntextbox Words for\ntype sks dog"
    steps += "\nstart Teach SDXL your pictures\nended See the run\nlink Compare its pictures\nbutton Keep right"
    walk(walker, f"{steps}\nlink Open them", draw_pictures(folder / "photographs", 15))
    sees(walker, "1 picture of one thing")
