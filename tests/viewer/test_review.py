"""The review of labels: keys and what they save, two tabs, a file that cannot be written, a restart, and training."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.layouts.names import CORRECTIONS
from data.tools.config import report_folder
from tests.data.collection.test_collection import load
from tests.support import rows
from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import HOSTILE, add_data, press, save_grey, sees
from utils.record.tables import LABELS, images_about
from viewer.differences import find_differences
from viewer.review import Review, make_question

CLASSES = [HOSTILE.replace("/", ""), "cat", "dog"]


def write_table(run, root, **columns):
    (run / "tables").mkdir(exist_ok=True)
    loss = np.array(columns.get("loss", range(len(columns["path"]))))
    table = pa.table({**columns, "rank": (-loss).argsort().argsort()})
    pq.write_table(table.replace_schema_metadata({"root": str(root)}), run / "tables/images.parquet")


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    root = tmp_path_factory.mktemp("animals")
    for name in CLASSES:
        for number in range(3):
            save_grey(root / name / f"{number}.png", 80 * number)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, animals):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "bare", "other"):
        add_data(make_run(folder / name), root=str(animals), validation_fraction=0.34)
    paths = [f"{name}/{number}.png" for name in CLASSES for number in range(3)]
    one = {
        "path": ["cat/0.png"],
        "label": ["cat"],
        "prediction": ["dog"],
        "wrong": [True],
        "loss": [1.0],
        "probability": [0.5],
    }
    write_table(folder / "other", "/elsewhere", **one)
    given = [path.split("/")[0] for path in paths]
    write_table(folder / "a", animals, path=[*paths, "gone.png"], label=[*given, "cat"],
                prediction=["cat"] * 3 + ["dog"] * 3 + ["dog"] * 4, wrong=[True] * 6 + [False] * 3 + [True],
                loss=[2.8, 2.9, 3.0, 0.9, 0.8, 0.7, 0.1, 0.1, 0.1, 9.0],
                probability=[0.5] * 10)  # fmt: skip
    return folder


def test_differences_of_tags_are_ranked(tmp_path):
    write_table(tmp_path, "there", path=["a", "b", "c"], wrong=[["x", "y"], [], []], missed=[["z"], ["x"], []],
                       wrong_by=[[0.1, 0.3], [], []], missed_by=[[0.2], [0.4], []])  # fmt: skip
    assert images_about(tmp_path, "root") == "there"
    assert [found[:3] for found in find_differences(tmp_path, 9)] == [
        ("b", 0.4, {"x": False}),
        ("a", 0.3, {"y": True, "z": False, "x": True}),
    ]


def test_tags_are_toggled_and_undone():
    had = ["blue hair", "character:miku", "hat"]
    review = Review([make_question(path, 0.5, {"red_hair": True, "hat": False}, had) for path in ("a.png", "b.png")])
    review.by = "me"
    with_both = ["blue hair", "character:miku", "hat", "red hair"]
    (line,) = review.decide({"a.png": with_both, "gone.png": had})
    assert (line.now, line.verdict) == (with_both, "edited")
    assert [(each.now, each.verdict) for each in review.decide({"a.png": had})] == [(had, "rejected")]
    review.go(None)
    (line,) = review.decide({"b.png": review.card(1)["says"]})
    assert (line.now, line.verdict) == (["blue hair", "character:miku", "red hair"], "accepted")
    loaded = Review(review.questions)
    loaded.by, loaded.decisions = "me", deepcopy(review.decisions)
    assert loaded.undo()[0].path == "b.png"
    assert review.undo()[0].now == had and review.last(1) is None and review.here == 1
    assert review.undo()[0].now == had and review.last(0).now == with_both and review.here == 0
    assert len(review.undo()) == 1 and review.last(0) is None and review.undo() == []
    for review.by, tags in (("Ann 1", had), ("Bob 2", []), ("3", with_both)):
        review.decide({"a.png": tags})
    assert review.card(0)["votes"] == {"Ann": had, "Bob": []} and not review.card(1)["votes"]


def test_the_page(page, address, browser, animals, runs, tmp_path):
    def wait(text):
        page.get_by_text(text, exact=False).first.wait_for()

    def saved():
        return [(row["path"].split("/")[-1], row["now"], row["verdict"]) for row in rows(animals / CORRECTIONS)]

    page.goto(f"{address}/review?run=0/bare")
    wait("No image is known")
    page.goto(f"{address}/review?run=0/other")
    wait("are in /elsewhere, not")
    page.goto(f"{address}/run/0/a")
    page.get_by_role("tab", name="Mistakes").click()
    page.get_by_role("link", name="Review").click()
    wait("0 of 6 decided")
    page.get_by_label("keys and notes").click(), wait("a judges 10 images and has trained on 6 of them")
    page.get_by_label("keys and notes").click(), page.evaluate("document.activeElement.blur()")
    press(page, "Enter"), wait("1 of 6 decided")
    press(page, "r"), wait("2 of 6 decided")
    press(page, "u"), wait("1 of 6 decided")
    press(page, "x"), press(page, "ArrowRight"), press(page, "x")
    press(page, "3"), wait("3 of 6 decided")
    hostile = CLASSES[0]
    assert saved() == [("2.png", "cat", "accepted"), ("1.png", hostile, "rejected"), ("1.png", hostile, "undone"),
                        ("1.png", "dog", "edited"), ("0.png", "dog", "edited")]  # fmt: skip
    assert page.locator("img[onerror]").count() == 0 and page.get_by_text("<img src=x").count() >= 1
    other = browser.new_page()
    other.goto(page.url)
    sees(other, "3 of 6 decided")
    (animals / CORRECTIONS).rename(animals / "held")
    (animals / CORRECTIONS).mkdir()  # cannot be written
    press(page, "Enter"), wait("1 decisions wait here and are tried again: data.corrections")
    page.reload()
    wait("decided")
    (animals / CORRECTIONS).rmdir()
    (animals / "held").rename(animals / CORRECTIONS)
    sees(other, "4 of 6 decided")
    page.wait_for_timeout(2_500)
    assert saved()[-1] == ("0.png", "dog", "accepted")
    other.close()
    labels = load(animals, tmp_path, 0.34).table["label"].to_pylist()  # as the next training does
    assert labels == ["dog", "dog", "cat", "dog", "cat", "cat", *["dog"] * 3]


def test_a_key_is_for_what_has_the_focus(page, address, animals):
    """Enter presses a button or follows a link and decides nothing; after a click, keys are for the page."""
    file = animals / CORRECTIONS
    verdicts = [row["verdict"] for row in rows(file)]

    def wait_for(*new):
        page.wait_for_timeout(700)
        verdicts.extend(new)
        assert [row["verdict"] for row in rows(file)] == verdicts

    page.goto(f"{address}/review?run=0/a&image=cat/2.png")
    sees(page, "cat/2.png:")
    page.get_by_role("button", name="Reject").focus()
    page.keyboard.press("Enter"), wait_for("rejected")
    page.keyboard.press("1"), wait_for()  # the button has the focus
    page.get_by_role("link", name="Runs").focus()
    page.keyboard.press("r"), wait_for()
    page.evaluate("document.activeElement.blur()")
    page.get_by_role("button", name="Undo").click(), wait_for("undone")
    page.keyboard.press("r"), wait_for("rejected")


def test_a_key_is_for_a_picture_that_is_drawn_and_waits_for_the_server(page, address, animals):
    away = []

    def relay(socket):
        server = socket.connect_to_server()
        socket.on_message(lambda message: away or server.send(message))

    before = rows(animals / CORRECTIONS)
    page.route("**px=1280", lambda route: None)
    page.add_init_script("localStorage.setItem('name', 'Ann')")
    page.route_web_socket("**/socket.io/**", relay)
    page.goto(f"{address}/review?run=0/a&image=cat/2.png")
    page.locator(".card.here").wait_for()
    page.keyboard.press("r"), sees(page, "This key came before the picture")
    page.unroute("**px=1280")
    away.append("away")
    press(page, "r"), sees(page, "waits here (1)")
    assert rows(animals / CORRECTIONS) == before
    away.clear()
    page.get_by_text("waits here").wait_for(state="detached")
    (line,) = rows(animals / CORRECTIONS)[len(before) :]
    assert line["verdict"] == "rejected" and line["by"].startswith("Ann ")
    page.locator(".picture").hover()
    page.mouse.wheel(0, -400)
    page.locator(".picture.large").wait_for()


def test_reasons_and_a_class_by_its_name(page, address, animals, runs):
    for number in range(7):
        save_grey(animals / f"class{number}/0.png")
    columns = {"path": ["dog/1.png", "dog/2.png"], "given": ["dog"] * 2, "proposed": ["cat"] * 2, "rank": [1, 2]}
    columns |= {"probability": [0.25, 0.5], "guesses": [["cat", "dog"]] * 2, "probabilities": [[0.75, 0.125]] * 2}
    columns["neighbours"] = [["cat/2.png"], []]
    folder = add_data(
        make_run(Path(report_folder(str(runs), str(animals)), "labels")), root=str(animals), validation_fraction=0.34
    )
    (folder / "tables").mkdir()
    pq.write_table(pa.table(columns, metadata={"root": str(animals), "says": "a network"}), folder / LABELS)
    page.goto(f"{address}/run/0/a?tab=Mistakes")
    page.get_by_role("link", name="Review").click()
    sees(
        page,
        "given: dog (right: 25.0%) · guessed: cat 75.0%, dog 12.5%",
    )
    page.locator(".near img").wait_for()
    press(page, "c")
    page.wait_for_function("document.activeElement.tagName == 'INPUT'")
    page.keyboard.type("class3", delay=60)
    page.get_by_role("option", name="class3").wait_for()
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    sees(page, "1 of 2 decided")
    page.wait_for_function("document.activeElement == document.body")
    page.keyboard.press("2")
    sees(page, "2 of 2 decided")
    decided = [(row["path"], row["now"]) for row in rows(animals / CORRECTIONS)]
    assert decided[-2:] == [("dog/1.png", "class3"), ("dog/2.png", "dog")]
