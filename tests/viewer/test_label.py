"""Labels from nothing: keys give labels, the rest is proposed, a class is renamed; a second page sees it. Tags, too."""

import pytest

from tests.support import make_collection
from tests.viewer.conftest import HOSTILE, assert_accessible, assert_fits, sees


@pytest.fixture(scope="module")
def words(folder):
    make_collection(folder, classes=".")  # without class folders
    return [f"runs={folder}", f"data.root={folder}"]


def test_labels_follow_keys_and_the_rest_is_proposed(page, address):
    page.goto(f"{address}/collection")
    page.locator("a[href^='/collection/']").click()
    page.get_by_role("link", name="Label these images").click()
    for name in ("a", HOSTILE):
        page.get_by_label("A class, then Enter").fill(name, timeout=240_000)  # torch is imported
        page.keyboard.press("Enter")
        page.get_by_role("link", name=f"Proposed: {name}").wait_for()
    page.keyboard.press("Escape")
    for number in range(20):
        sees(page, f"{number} of 23 labelled")
        page.keyboard.press("12"[number % 2])
    sees(page, "the others recognise")
    other = page.context.new_page()
    other.goto(page.url)
    for key, count in (("Enter", 21), ("u", 20), ("a", 20), ("Enter", 23)):
        page.keyboard.press(key)
        sees(other, f"{count} of 23 labelled; the others recognise")
    assert_fits(page)
    assert_accessible(page)
    page.bring_to_front()  # a menu needs the focus
    page.get_by_label("in place of").click()
    page.get_by_role("option").first.click()
    page.get_by_label("A class, then Enter").fill("b")
    page.keyboard.press("Enter")
    other.get_by_text("1 b", exact=True).wait_for()
    page.keyboard.press("Escape"), page.keyboard.press("u")
    other.get_by_text("1 a", exact=True).wait_for()
    page.reload()
    sees(page, "23 of 23 labelled; the others recognise")


def test_tags_are_switched_by_keys(page, address):
    page.goto(f"{address}/collection")
    page.locator("a[href^='/collection/']").click()
    page.get_by_role("link", name="Tag them").click()
    page.get_by_label("A tag, then Enter").fill("hat", timeout=240_000)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="hat").wait_for()
    for key in ("Escape", "a", "e", "e"):  # away from the shown one, which alone has it; then to all
        page.keyboard.press(key)
    page.wait_for_function("document.querySelectorAll('.decided').length == 23")
    page.keyboard.press("u")
    page.wait_for_function("document.querySelectorAll('.decided').length == 1")
    assert_accessible(page)
