"""prepare.py job=labels: the table, which the page's review reads, and what it refuses."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.predictor import Predictor
from tests.engine.frozen.test_features import RESNET, place  # noqa: F401
from tests.in_process import run
from tests.support import refuses
from utils.io.files import read_json
from utils.record.tables import LABELS, images_about
from viewer.differences import find_differences

COLOURS = {"red": (200, 30, 30), "green": (30, 190, 40), "blue": (40, 50, 210)}
WRONG = ("07.png", "16.png", "25.png", "34.png")  # green ones, which are called blue
COMMAND = ["job=labels", "data=image_folder", "data.root=pictures", "job.report=outputs/care"]


@pytest.fixture
def pictures(place, monkeypatch):  # noqa: F811
    """A folder with 20 images of each colour; all have a sidecar with it, and no folder of a class.

    The features of an image are its mean colour.
    """
    monkeypatch.setattr(Predictor, "embed", lambda self, images: images.float().mean(dim=(2, 3)).numpy())
    draw = np.random.default_rng(0)
    root = place / "pictures"
    root.mkdir()
    for number in range(60):
        name = [*COLOURS][number % 3]
        pixels = np.full((48, 48, 3), COLOURS[name]) + draw.integers(-20, 20, (48, 48, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number:02}.png")
        (root / f"{number:02}.txt").write_text(f"{name}, square")
    return root


def read_table(place):  # noqa: F811
    return pq.read_table(place / "outputs/care/labels" / LABELS).to_pylist()


def test_classes(pictures, place):  # noqa: F811
    for number, file in enumerate(sorted(pictures.glob("*.png"))):
        file.with_suffix(".txt").unlink()
        folder = pictures / [*COLOURS][2 if file.name in WRONG else number % 3]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    (pictures / "alone").mkdir()
    Image.new("RGB", (48, 48)).save(pictures / "alone/1.png")  # no other image says anything of it
    (pictures / "red/00.png").write_bytes(b"no image")
    run("prepare", COMMAND, place)
    rows = read_table(place)
    assert [row["rank"] for row in rows] == [*range(1, 60)] and sorted(row["path"] for row in rows[:4]) == [
        f"blue/{name}" for name in WRONG
    ]
    for number, row in enumerate(rows):
        assert (row["given"] == row["proposed"]) == (number > 3)
    first = rows[0]
    assert (first["given"], first["proposed"]) == ("blue", "green")
    assert sum(path.startswith("green/") for path in first["neighbours"]) > 3
    assert first["path"] not in first["neighbours"]
    assert first["guesses"][0] == "green" and first["probabilities"][0] > 0.8
    folder = place / "outputs/care/labels"
    (found,) = find_differences(folder, 1)
    assert found[:3] == (first["path"], 1 - first["probability"], "green") and found.near == first["neighbours"]
    assert images_about(folder, "root") == str(pictures) and RESNET in images_about(folder, "says")
    assert first["path"] in (folder / "report.html").read_text()


def test_growth_and_what_to_label_next(place):  # noqa: F811
    """Without weights, the features are small pictures."""
    (place / f"hub/models--timm--{RESNET}/snapshots/0/model.safetensors").unlink()
    draw = np.random.default_rng(0)
    root = place / "pictures"
    root.mkdir()
    lines = []
    for number in range(80):
        pixels = draw.integers(0, 120, (24, 24, 3)) + 130 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number:02}.png")
        label = ["dark", "light"][number % 2] if number < 70 else None
        lines.append(json.dumps({"path": f"{number:02}.png", "label": label}) + "\n")
    (root / "manifest.jsonl").write_text("".join(lines))
    said = run("prepare", COMMAND, place)
    assert "labels: 70; wrong, at least: 0" in said and "accuracy with 140 labels: 0.9" in said
    folder = place / "outputs/care/labels"
    growth = read_json(folder / "labels.json")["tables"]["growth"]
    assert [row["images"] for row in growth] == [70, 140] and growth[1]["low"] <= growth[1]["accuracy"]
    ranked = pq.read_table(folder / "tables/next.parquet").to_pylist()
    assert sorted(row["path"] for row in ranked) == [f"{number}.png" for number in range(70, 80)]
    assert "at 16 px" in images_about(folder, "says")


def test_tags(pictures, place):  # noqa: F811
    for name in WRONG:
        (pictures / name).with_suffix(".txt").write_text("square")
    (pictures / "03.txt").write_text("red, green, square")
    assert "runs=outputs/care shows them under /review?run=0/labels" in run("prepare", COMMAND, place)
    rows = read_table(place)
    assert {(row["path"], row["tag"], row["given"]) for row in rows[:5]} == {
        *((name, "green", False) for name in WRONG), ("03.png", "green", True),
    }  # fmt: skip
    found = find_differences(place / "outputs/care/labels", 100)
    assert {each.path: each.says["green"] for each in found[:5]} == {**dict.fromkeys(WRONG, True), "03.png": False}


def test_what_is_refused(pictures, place):  # noqa: F811
    for file in pictures.iterdir():
        file.unlink()
    with refuses("^data.root: "):
        run("prepare", COMMAND, place)
    for folder in ("a", "b"):
        (pictures / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (48, 48)).save(pictures / f"{folder}/{number}.png")
    with refuses("^job.weights: "):
        run("prepare", [*COMMAND, "job.weights=nothing"], place)
