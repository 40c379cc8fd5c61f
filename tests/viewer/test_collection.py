"""The page of a collection in a browser, over hostile names and a broken image; collections that cannot be opened."""

import json
import re
from pathlib import Path

import pyarrow.compute as pc
import pytest

from data.images.open import EMPTY
from tests.data.collection.test_collection import load
from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import HOSTILE, add_data, save_grey, sees

NAME = HOSTILE.replace("/", "")


@pytest.fixture(scope="module")
def words(folder):
    """A collection of 400 images; the last one is empty, and the file of the one before vanishes when it is indexed."""
    root = folder / NAME
    rows = []
    for number in range(400):
        path = f"{NAME}/{number:03}{HOSTILE.replace('/', '')}.png"
        rows.append({
            "path": path, "label": f"{HOSTILE}{number % 2}", "tags": [HOSTILE, f"character:n{number}", '"'],
            "caption": HOSTILE, HOSTILE: HOSTILE, "weight": float(number < 399),
        })  # fmt: skip
        save_grey(root / path, number % 255, (40, 30))
    (root / path).write_bytes(b"")
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = folder / "runs"
    add_data(make_run(runs / "run"), root=str(runs / "gone"))
    return [f"runs=[{runs},{runs}/none]", f"data.root={root}"]


def find(page, text, count):
    page.get_by_label("find").fill(text)
    page.get_by_label("find").press("Enter")
    sees(page, f"{count} of 400 images")


def test_a_collection_is_searched_and_shown(page, address, folder):
    page.goto(address)
    page.locator("a[href^='/collection/']").first.click()
    find(page, "", 400)
    assert 0 < page.locator(".tile").count() < 100, "those in view"
    page.locator(".tile").first.press("Enter")  # in one call: a late drawing after the resize takes the focus away
    sees(page, "40 x 30")
    page.wait_for_url("**image=0*")
    page.go_back()
    page.locator(".q-dialog").wait_for(state="detached")
    page.locator(".tiles").evaluate("box => box.scrollTop = box.scrollHeight")
    page.locator(".tile[title*='399']").click()
    page.get_by_text(EMPTY, exact=False).wait_for()
    assert page.get_by_text(HOSTILE, exact=True).count() > 0 and page.locator("img[onerror]").count() == 0
    page.keyboard.press("Escape")
    page.locator(".q-dialog").wait_for(state="detached")
    for text, count in {"-character:n7 character:*": 399, "weight=0": 1, "label:1 path:/12": 10, "size<1": 1}.items():
        find(page, text, count)
    page.wait_for_url("**find=size*")
    page.get_by_role("button", name="Keep this search").click()
    page.reload()
    assert page.get_by_role("listitem").get_by_role("link").get_attribute("href") == "?find=size%3C1"
    sees(page, "1 of 400 images")
    box = page.get_by_label("find")
    assert box.input_value() == "size<1"
    box.fill("size>big"), box.press("Enter")
    sees(page, "size has numbers")
    find(page, "", 400)
    sees(page, "50.0%")  # the table is drawn anew
    page.locator(".term", has_text=f"{HOSTILE}1").press("Enter")
    sees(page, "200 of 400 images")
    page.locator("input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("known format").wait_for(timeout=240_000)
    page.locator("input[type=file]").set_input_files(folder / NAME / NAME / f"007{NAME}.png")
    page.get_by_text("The 48 images most like").wait_for(timeout=240_000)
    page.get_by_role("link", name="Map").click()
    canvas = page.get_by_label("map of the images").locator("canvas")
    canvas.wait_for(timeout=240_000)
    page.get_by_text("400 of 400 images", exact=True).wait_for()
    left, top, width, height = canvas.bounding_box().values()
    page.mouse.click(left + width - 60, top + 22)
    page.mouse.move(left + width / 6, top + height / 5)
    page.mouse.down()
    page.mouse.move(left + width / 6, top + height, steps=4)
    page.mouse.move(left + width, top + height / 2, steps=4)
    page.mouse.up()
    page.get_by_text(re.compile("^[1-9][0-9]* marked")).wait_for()


def test_what_is_decided_on_marked_images(page, address, words, tmp_path):
    page.goto(address)
    page.locator("a[href^='/collection/']").first.click()
    sees(page, "400 of 400 images")
    root = Path(words[1].removeprefix("data.root="))

    def act(title, done, text=""):
        page.get_by_label("a label, or tags").fill(text)
        page.get_by_role("button", name=title).click()
        page.locator(f"[data-done='{done}']").wait_for()

    page.locator(".pick input").nth(1).click()
    page.locator(".tile").nth(4).click(modifiers=["Shift"])
    sees(page, "4 marked")
    page.locator(".tile").nth(2).press("x")
    sees(page, "3 marked")
    page.keyboard.press("x")
    sees(page, "4 marked")  # a tile keeps the focus
    page.get_by_role("button", name="Unmark all").click()
    find(page, "path:/12", 10)
    page.get_by_role("button", name="Mark all found").click()
    act("Relabel", 1, "An owl")
    find(page, "OWL", 10)
    act("Leave out", 2)
    find(page, "weight=0", 11)
    act("Add tags", 3, "new, red hat")
    act("Take tags away", 4, HOSTILE)
    find(page, f'new "red hat" -"{HOSTILE}"', 10)
    act("Group", 5)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save manifest").click()
    saved.value.save_as(tmp_path / "some.parquet")
    collection = load(root, tmp_path, table=str(tmp_path / "some.parquet"))
    kept = collection.table.filter(pc.equal(collection.table["label"], "An owl"))
    assert kept["weight"].to_pylist() == [0.0] * 10 and len({*kept["group"].to_pylist()}) == 1
    for done in range(5):
        act("Undo", 4 - done)
    find(page, "", 400)
    find(page, "owl OR weight<1", 1)


def test_a_collection_that_is_gone_says_so(page, address):
    page.goto(f"{address}/run/0/run")
    page.get_by_role("link", name="gone").click()
    sees(page, "does not exist")
