"""Rows of predict.py: each against the network applied to its file alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.transforms import EvalTransform
from engine.exports.weights import open_weights
from tests.in_process import TINY, make_images, run
from tests.support import read_table, rows
from utils.io.weights import read_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a run of three classes, and images of which the third of six cannot be read."""
    folder = tmp_path_factory.mktemp("predict")
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
    weights = open_weights(place / "run/weights/best_weights.safetensors")
    transform, names = EvalTransform(weights.metadata["preprocessing"]), weights.metadata["class_names"]
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
