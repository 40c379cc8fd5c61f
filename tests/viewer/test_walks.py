"""From a folder to a network that its owner trusts, with the clicks and keys of a person (docs/viewer.md)."""

import random

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support import rows
from tests.viewer.conftest import draw_for_docs, press, sees

COLOURS = ["blue", "green", "red", "white", "yellow"]
DOG = """
................
..........#..#..
#.........####..
#.........##.##.
.#........######
.#........#####.
..############..
..###########...
..###########...
..###########...
..###########...
..##.##...##.#..
..#..#....#..#..
..#..#....#..#..
..#..#....#..#..
..##.##...##.##.
"""
HELPS_MOST = "document.querySelector('.stage[data-drawn=true]') && document.querySelector('.screen-title').textContent"


def draw_pictures(folder, count, wrong=()):
    """Draw dogs on five colours, in folders of these names. wrong: numbers of pictures in the folder of another."""
    draw = random.Random(count)
    dog = Image.fromarray(np.array([[*line] for line in DOG.split()]) == "#").convert("L")
    for number in range(count):
        place = folder / COLOURS[(number + (number in wrong)) % 5]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (96, 96), COLOURS[number % 5])
        picture.paste("black", (draw.randint(0, 40), draw.randint(0, 40)), dog.resize([draw.randint(40, 80)] * 2))
        picture.save(place / f"{number % 5 + 1}picture{number}.png")
    return sorted(folder.rglob("*.png"))


def walk(page, steps, files=()):
    """Do what lines say: keys, text to type, files to choose, a card to start, an end to open, or other roles."""
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
            page.locator(".job.good", has_text=name).get_by_role("link").click()  # the newest one is not folded
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
    walk(walker, "link Train\nstart Train\nended Train on")
    walker.locator(".front-big", has_text="%").wait_for()
    draw_for_docs(walker, "viewer_run_light", height=560)
    walk(walker, "link Try a picture\nchoose Drop, paste or choose images", draw_pictures(folder / "new", 5))
    walker.get_by_text("as the network sees it").nth(4).wait_for()
    walker.go_back()
    walk(walker, "button Export (ONNX)\nended Export 1picture")
    with walker.expect_download() as saved:
        walk(walker, "link Download model.onnx")
    output, *_ = pytest.importorskip("onnxruntime").InferenceSession(saved.value.path()).get_outputs()
    assert output.shape[1] == len(COLOURS)


def test_wrong_labels_are_found_mended_and_the_gain_is_measured(walker, address, folder):
    wrong = [1, 27, 53, 74, 95]
    draw_pictures(folder / "colours", 100, wrong)
    walker.goto(address)
    walk(walker, f"button Browse\nbutton {folder}\nbutton colours\nlink Open this folder\nstart Train")
    walk(walker, "start Find wrong labels\nended Find wrong labels in" + "\npress Enter" * 5 + "\nlink Train")
    mended = [f"{row['was']} {row['now']}" for row in rows(folder / "colours/corrections.jsonl")]
    assert {*mended} == {f"{COLOURS[(number + 1) % 5]} {COLOURS[number % 5]}" for number in wrong}
    walk(walker, "start Train\nended Train on colours\nlink Compare with\nbutton Measure both")
    sees(walker, "images that both have measured", "95 % interval")
    draw_for_docs(walker, "viewer_compare_dark", height=560, scheme="dark")


def test_photographs_become_pictures_of_a_prompt(walker, address, folder):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    from tests.small_sdxl import write_base

    walker.goto(address)
    base = write_base(folder / "base")
    steps = f"choose Choose pictures\ntextbox File or folder of SDXL\ntype {base}\ntextbox Words for\ntype sks dog"
    walk(walker, f"{steps}\nstart Teach SDXL your pictures", draw_pictures(folder / "dogs", 15))
    while not (drawn := [*folder.glob("*/plots/steps/*/samples.png")]):
        walker.wait_for_timeout(50)
    run = drawn[0].parents[3]
    processes = psutil.process_iter(["cmdline"])
    training = next(each for each in processes if f"run_dir={run}" in (each.info["cmdline"] or ()))
    training.suspend()
    walker.locator(".job:not(.good)").get_by_role("link", name="See the run").click()
    walk(walker, "link Compare its pictures")
    walker.get_by_alt_text("right: ").wait_for()
    training.resume()
    walker.get_by_alt_text("step ").last.wait_for()  # by itself
    walk(walker, "button Keep right\nlink Open them")
    sees(walker, "1 picture of one thing")
