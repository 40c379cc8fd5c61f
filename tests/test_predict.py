"""Rows of predict.py: each against the network applied to its file alone."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.steps import evaluation_views
from engine.exports.opened_task import open_task
from engine.exports.predictors import load_predictor
from tests.in_process import TINY, configure, make_images, run
from tests.support import read_table, refuses, rows
from utils.io.weights import read_weights


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with a run of three classes, and images of which the third of six cannot be read."""
    make_images(folder / "images", "ABC")
    run("finetune", [*TINY, "data.root=images", "run_dir=run", "optim.lr=0.05", "model.head_init_scale=1.0"], folder)
    (folder / "images/val/B/000.png").write_bytes(b"no image")
    return folder


def test_each_row_is_what_the_network_says_of_its_file(place):
    """Two batches, the first without its last image."""
    given = ["weights=run", "input=images/val", "top=3", "batch_size=3"]
    for output in ("found.jsonl", "found.csv"):
        run("predict", [*given, f"output={output}"], place)
    found = rows(place / "found.jsonl")
    for row, line in zip(found, read_table(place / "found.csv"), strict=True):
        assert line == {name: str(row.get(name, "")) for name in ("path", "class", "prob", "error")}
    assert [row["path"] for row in found] == [f"images/val/{c}/{number:03}.png" for c in "ABC" for number in range(2)]
    assert found.pop(2).keys() == {"path", "error"}
    weights = open_task(place / "run/weights/best_weights.safetensors")
    transform = evaluation_views(weights.metadata["preprocessing"])["images"]
    names = weights.metadata["class_names"]
    for row in found:
        pixels = torch.from_numpy(np.array(Image.open(place / row["path"]).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            values, order = weights.model(transform(pixels)[None])[-1][0].sort(descending=True)
        assert [each["class"] for each in row["top"]] == [names[index] for index in order]
        assert [each["prob"] for each in row["top"]] == pytest.approx(values.tolist(), abs=2e-6)
        assert row["top"][0] == {"class": row["class"], "prob": row["prob"]}
    assert len({round(row["prob"], 3) for row in found}) == 5  # images that one network tells apart
    (place / "form.csv").write_text("\n".join(["id,B,A", *(f"{row['path'][11:]},0,0" for row in found)]))
    run("predict", [*given, "output=filled.csv", "form=form.csv"], place)
    for row, line in zip(found, read_table(place / "filled.csv"), strict=True):
        probs = {each["class"]: each["prob"] for each in row["top"]}
        assert [float(line[name]) for name in "BA"] == pytest.approx([probs["B"], probs["A"]], abs=1e-6)


# --- the promise of a classifier


@pytest.fixture(scope="module")
def evaluate(place):
    """Return the words that evaluate 17 other images, of which the run gets all right."""
    run("predict", ["weights=run", "input=images", "output=found.jsonl"], place)
    for number, row in enumerate(row for row in rows(place / "found.jsonl") if "class" in row):
        (place / "others" / row["class"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(place / row["path"], place / f"others/{row['class']}/{number}.png")
    return ["run_dir=run", "runtime.device=cpu", "runtime.workers=0", "data.root=others", "output=measured"]


def test_a_promise_goes_from_the_calibration_to_rows_exports_and_cards(place, evaluate):
    """All answers to 17 other images are right. An answer above the threshold is sure, in the run and its exports."""
    for words, message in (
        (["calibrate=true"], r"^risk: None, .* such as 0\.05"),
        (
            ["calibrate=true", "risk=0.05"],
            r"^risk: 0\.05 cannot be promised on 17 images: .* risk=0\.17 can be promised",
        ),
        (["risk=0.05"], r"^risk: 0\.05, but it is for calibrate=true of a classifier"),
    ):
        with refuses(message):
            run("evaluate", [*evaluate, *words], place)
    run("evaluate", [*evaluate, "calibrate=true", "risk=0.25"], place)
    file = place / "run/weights/best_thresholds.csv"
    (promise,) = read_table(file)
    (table,) = (place / "measured").rglob("evaluate_*thresholds.csv")
    assert promise["support"] == "17" and read_table(table)[0]["note"] == promise["note"]
    given = ["input=images/val/A", "existing=overwrite"]
    run("predict", ["weights=run", *given, "output=sure.csv"], place)
    probs = sorted(float(row["prob"]) for row in read_table(place / "sure.csv"))
    middle = sum(probs) / 2
    assert list(read_table(place / "sure.csv")[0]) == ["path", "class", "prob", "unsure", "error"]

    file.write_text(file.read_text().replace(promise["threshold"], f"{middle:.9g}"))
    for form in ("onnx", "safetensors"):
        run("export", ["run_dir=run", f"format={form}", f"output={form}"], place)
        assert "with 95 % confidence, at most 25 % of the answers" in (place / form / "README.md").read_text()
    assert run("evaluate", [*evaluate, "weights=onnx/model.onnx"], place) == run("evaluate", evaluate, place)
    for weights in ("run", "onnx/model.onnx", "safetensors/model.safetensors"):
        run("predict", [f"weights={weights}", *given, "output=sure.jsonl"], place)
        found = rows(place / "sure.jsonl")
        assert sorted(row["prob"] for row in found) == pytest.approx(probs, abs=1e-5)
        assert all(row["unsure"] == (row["prob"] < middle) for row in found)
    run("predict", ["weights=run", *given, "output=sure.jsonl", "threshold=0"], place)
    assert all("unsure" not in row for row in rows(place / "sure.jsonl"))
    assert_the_page_is_unsure(middle, place)


def assert_the_page_is_unsure(middle, place):
    """Ask the network as the page does; last, as its packages may not be there."""
    pytest.importorskip("nicegui", reason="make install-view")
    from viewer.networks import Networks

    answers = {}
    networks = Networks([place], lambda path: load_predictor(path, torch.device("cpu")), configure("view")[0].text)
    for image in sorted((place / "images/val/A").glob("*.png")):
        bars, caption, *_ = networks.ask(str(place / "run"), "balanced", image.read_bytes(), image.name)
        answers[caption == "unsure"] = [bar.is_chosen for bar in bars["classes"]]
        assert [bar.least for bar in bars["classes"]] == [pytest.approx(middle)] * 3
    assert answers == {True: [False] * 3, False: [True, False, False]}


# --- the background of transparent images


def test_the_background_of_training_goes_with_the_weights(tmp_path):
    """Training states it, weight files keep it, predictions and evaluations use it."""
    make_images(tmp_path / "images")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "images/train/A/clear.png")
    run("finetune", [*TINY, "data.root=images", "run_dir=run", "data.background=[255,0,0]"], tmp_path)
    metadata = read_weights(tmp_path / "run/weights/last_weights.safetensors")[1]
    assert metadata["preprocessing"]["background"] == [255, 0, 0]
    results = {}
    for name, colour in (("clear", (0, 0, 0, 0)), ("red", (255, 0, 0)), ("white", (255, 255, 255))):
        Image.new("RGBA" if len(colour) == 4 else "RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        run("predict", ["weights=run", f"input={name}.png", f"output={name}.jsonl", "device=cpu"], tmp_path)
        results[name] = rows(tmp_path / f"{name}.jsonl")[0]["top"]
    assert results["clear"] == results["red"] != results["white"]
