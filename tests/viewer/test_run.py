"""The page of a run: thresholds, mistakes with their images, pictures by step, the log by level; whole sweeps."""

import json

import pyarrow.parquet as pq
import pytest

from tests.utils.record.test_curves import line
from tests.utils.record.test_run_index import make_run
from tests.viewer.conftest import HOSTILE, add_data, save_grey, sees
from tests.viewer.test_review import write_table
from utils.record.curves import Curves
from utils.record.run_index import RunIndex
from viewer.curves import read_figures
from viewer.images import Shelf
from viewer.results import describe_prediction, find_addresses

DECISIONS = "group,positives,threshold,predicted,correct,precision,recall,f1\n" + "".join(
    f"{HOSTILE},90,{level / 100},{100 - level},{90 - level if level < 90 else 0},"
    f"{(90 - level) / (100 - level) if level < 90 else 0},{max(0, 90 - level) / 90},0.5\n"
    for level in range(100)
)
PLAN = "2026-01-01 00:00:00,000 INFO the plan for 5 minutes\n  optim=sgd because it is good\n"
NEXT = "2026-01-01 00:00:00,000 INFO finished\n  by class  cat 1 of 2 right\n  next        python export.py run_dir=x\n"
NEXT += "  collection  /x: 90 training and 6 validation images\n"
NEXT += "  next        python evaluate.py run_dir=x\n"
LOG = "".join(f"2026-01-01 00:00:00,000 {level} about {level}\n" for level in ("INFO", "WARNING", "ERROR"))


@pytest.fixture(scope="module")
def runs(folder):
    """A sweep of two runs; the first has all that an evaluation leaves, and a collection."""
    figures = {"mean_class_accuracy": 0.25, "top1": 0.5, "samples": 96, "always_one_class": 0.5}
    best = {"metric": "top1", "value": 0.5, "step": 2, "is_lowest_best": False, "figures": figures}
    result = json.dumps({**best, "findings": [{"line": "by pictures"}]})
    files = {"metrics_jsonl": line(1, loss=1.0, lr=0.1) + line(2, loss=0.5, lr=0.2), "result_json": result}
    for name in ("a", "b"):
        corrected = "2026-01-01 00:00:00,000 INFO data.corrections: x decides on 19 labels\n" * (name == "b")
        make_run(folder / "runs/sweep" / name, PLAN + LOG + NEXT + corrected, complete_json="{}", **files)
    run = folder / "runs/sweep/a"
    for number in range(3):
        save_grey(folder / f"images/train/{'xyz'[number]}/{number}.png", 80 * number)
        save_grey(run / f"plots/steps/{number * 10:08}/predictions.png")
    save_grey(run / "plots/predictions.png")
    add_data(run, root=str(folder / "images"))
    rows = {"path": ["train/x/0.png", "train/y/1.png", "elsewhere.png"], "label": ["y", HOSTILE, "y"]}
    rows |= {"prediction": ["x", "y", "x"], "probability": [0.5, 0.875, 0.25], "wrong": [True] * 3}
    write_table(run, folder / "images", loss=[1, 2, 0], **rows)
    (run / "tables/decisions.csv").write_text(DECISIONS)
    (run / "tables/confusions.csv").write_text(f"true,predicted,count,share\n{HOSTILE},y,1,0.5\n")
    return folder / "runs"


def test_images_of_the_collection_and_what_is_said_of_them(runs):
    shelf, run = Shelf(RunIndex([runs]), None), runs / "sweep/a"
    first, other = find_addresses(run, shelf, ["train/y/1.png", "elsewhere.png"])
    assert first.startswith("/image/") and first.endswith("/1?px=256") and other is None
    table = pq.read_table(run / "tables/images.parquet")
    pq.write_table(table.replace_schema_metadata({"root": "elsewhere"}), run / "tables/images.parquet")
    assert find_addresses(run, shelf, ["train/y/1.png"]) == [None]
    pq.write_table(table, run / "tables/images.parquet")
    assert find_addresses(runs / "sweep/b", shelf, ["train/y/1.png"]) == [None]
    tags = {
        "path": "",
        "prediction": ["a", "b", "c"],
        "probability": [0.4, 0.9, 0.5],
        "wrong": ["a", "b"],
        "missed": ["d"],
    }
    assert describe_prediction(tags)[1:] == ["+ b (0.90)", "+ a (0.40)", "− d"]


def test_curves_of_runs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        line(10, loss=2.0, seconds=60.0) + line(20, loss=1.0, seconds=90.0) + line(15, "evaluate", loss=3.0)
    )
    (curves := Curves(file)).read()
    (loss,) = read_figures({"": [curves]})
    trained, evaluated = loss["lines"]
    assert (trained["steps"], trained["minutes"], trained["values"]) == ([10, 20], [1.0, 1.5], [[2.0, 1.0]])
    assert (evaluated["minutes"], evaluated["values"]) == ([1.25], [[3.0]])
    file.write_text(line(10, loss=4.0) + line(30, loss=5.0))
    (other := Curves(file)).read()
    band = read_figures({"a": [curves, other]})[0]["lines"][0]
    assert band["values"] == [[3.0, 2.75, 3.0], [2.0, 1.0, 1.0], [2.0, 3.5, 4.0]]


def test_one_visit(page, address, runs):
    page.goto(f"{address}/run/0/sweep/a")
    sees(page, "Learning rate and steps")
    said = page.locator(".front").inner_text()
    assert all(
        text in said
        for text in ("finished", "50 %", "(40 % to 60 %)", "by pictures", "By class: cat 1", "on 90 images")
    )
    page.get_by_text("The plan", exact=True).click()
    sees(page, "optim=sgd because it is good")
    assert page.locator(".cards img").count() == 2
    page.get_by_text("show commands").click()
    assert page.locator(".front-command.done").inner_text().startswith("python evaluate.py per_image=true")
    page.get_by_role("tab", name="Tables").click()
    said = page.get_by_text("Threshold 0.50")
    assert "precision 0.800" in said.inner_text()
    page.locator("[aria-label=threshold] [tabindex]").press("ArrowRight")
    sees(page, "Threshold 0.51: precision 0.796")
    page.get_by_role("tab", name="Mistakes").click()
    page.locator(".cards img").nth(1).wait_for()
    assert page.locator(".cards > div").count() == 3
    box = page.locator("canvas").last.bounding_box()
    place = {"x": box["width"] * 0.8, "y": box["height"] * 0.2}
    page.locator("canvas").last.click(position=place, force=True)  # a layer for what is hovered may come above
    page.get_by_text("→ x (0.25)").wait_for(state="detached")
    sees(page, "→ y (0.88)")
    assert page.locator(".cards > div").count() == 1
    page.get_by_role("tab", name="Pictures").click()
    sees(page, "step 20")
    page.locator("[aria-label=step] [tabindex]").press("ArrowLeft")
    sees(page, "plots/predictions.png, step 10")
    assert page.get_by_text("dry_run=true").count() == 1
    page.get_by_role("tab", name="Log").click()
    sees(page, "about INFO")
    page.get_by_role("button", name="warnings and errors").click()
    page.get_by_text("about INFO").wait_for(state="hidden")
    assert page.get_by_text("about ERROR").is_visible() and page.locator("img[onerror]").count() == 0
    page.goto(f"{address}/run/0/sweep/b")
    sees(page, "step 2")
    (runs / "sweep/b").rename(runs / ".b")
    sees(page, "This run is deleted")
    (runs / ".b").rename(runs / "sweep/b")
    (runs / "sweep/b/tables").mkdir()
    table = pq.read_table(runs / "sweep/a/tables/images.parquet")
    table = table.set_column(table.column_names.index("wrong"), "wrong", [[False, False, True]])
    pq.write_table(table, runs / "sweep/b/tables/images.parquet")
    page.goto(f"{address}/compare?run=0/sweep")
    page.locator("canvas").first.wait_for()
    sees(page, "They saw other data: corrections.", "cannot tell which is better", "66.7 % more")
    page.get_by_role("heading", name="only sweep/b right: 2").wait_for()
    assert page.locator(".cards > div").count() == 3
    (arena := runs / "evaluate/arena-1/tables").mkdir(parents=True)
    (arena.parent / "arena.json").write_text((runs / "sweep/a/config.json").read_text())
    (arena / "arena_images.csv").write_text("tag,gain,path,a,b\nhat,-0.25,train/y/1.png,right,missed\n")
    page.goto(f"{address}/compare?taggers=arena-1")
    page.get_by_role("heading", name="hat: AP -0.250").wait_for()
    page.locator(".cards img").wait_for()
    sees(page, "b: missed")
