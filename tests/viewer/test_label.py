"""Labels from nothing: keys give labels, the rest is proposed, a class is renamed; a second page sees it. Tags, too."""

import pytest

from tests.support import make_collection
from tests.viewer.conftest import HOSTILE, press, sees


@pytest.fixture(scope="module")
def words(folder):
    make_collection(folder, classes=".")  # without class folders
    return [f"runs={folder}", f"data.root={folder}"]


def test_labels_follow_keys_and_the_rest_is_proposed(page, address):
    page.goto(address)
    page.locator("a[href^='/collection/']").click()
    page.get_by_role("link", name="Label", exact=True).click()
    for number, name in enumerate(("a", HOSTILE), 1):
        page.get_by_label("A class, then Enter").fill(name, timeout=240_000)
        page.keyboard.press("Enter")
        page.get_by_role("button", name=f"{number} {name}").wait_for()
    page.keyboard.press("Escape")
    for number in range(20):
        press(page, "12"[number % 2])
    sees(page, "of the rest")
    other = page.context.new_page()
    other.goto(page.url)
    for key, count in (("Enter", 21), ("u", 20), ("a", 20), ("Enter", 23)):
        press(page, key)
        sees(other, f"{count} of 23 labelled; of the rest")
    other.goto(f"{page.url}&show=%0A"), sees(other, "Nobody disagrees about an image.")
    other.go_back()
    page.keyboard.press("+")
    page.get_by_label("in place of").select_option("in place of a")
    page.get_by_label("A class, then Enter").fill("b")
    page.keyboard.press("Enter")
    other.get_by_role("button", name="1 b").wait_for()
    page.keyboard.press("Escape"), page.keyboard.press("u")
    other.get_by_role("button", name="1 a").wait_for()
    page.reload()
    sees(page, "23 of 23 labelled; of the rest", "All 23 images are decided", "Look for wrong labels")


def test_tags_are_switched_by_keys(page, address):
    page.goto(address)
    page.locator("a[href^='/collection/']").click()
    page.get_by_role("link", name="Tag", exact=True).click()
    press(page, "+")
    page.get_by_label("A tag, then Enter").fill("hat")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="e hat").wait_for()
    for key in ("Escape", "a", "e", "e"):  # away from the shown one, which alone has it; then to all
        press(page, key)
    page.wait_for_function("document.querySelectorAll('.decided').length == 23")
    page.keyboard.press("u")
    page.wait_for_function("document.querySelectorAll('.decided').length == 1")
