"""A held-out test set: train/, val/, test/ with labels, and another folder with labels (docs/held_out.md)."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.judging import folds
from tests.door.follow import follow
from tests.in_process import SMALL_MODEL, run
from tests.support import contents, front_matter, make_collection, read_table
from utils.io.files import read_json

ON_CPU = ["runtime.device=cpu", "runtime.threads=1"]
SHORT = [*SMALL_MODEL, *ON_CPU, "loop.minutes=null", "loop.total_steps=6", "loop.batch_size=16", "augment=glyphs"]
SHORT += ["augment.image_size_hw=[16,16]", "loop.micro_batch_size=16", "data.validation_fraction=0.0"]


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with the page's commands done: photos with three splits, and `later` with other images."""
    make_collection(folder / "photos", per_class=8, validation=3)
    shutil.move(make_collection(folder / "made", per_class=5, validation=4, seed=7) / "train", folder / "photos/test")
    shutil.move(folder / "made/val", folder / "later")
    words = {"PHOTOS": "photos", "RUN": "run", "OTHER": "later"}
    short = {"train.py": SHORT, "evaluate.py": ON_CPU}

    @torch.inference_mode(False)
    def run_here(jobs, settings, script):
        return {job: run(Path(script).stem, job.words, folder) for job in jobs}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "run_jobs", run_here)
        folder.joinpath("said.txt").write_text("\n".join(map(str, follow("held_out.md", folder, words, short))))
    return folder


def test_the_test_split_and_another_folder_are_measured_whole_beside_the_runs_own(place):
    found = [read_json(file) for file in sorted(place.glob("run/**/metrics*.json"))]
    assert [(each["split"], each["samples"], "data" in each) for each in found] == [
        ("all", 12, True), ("val", 9, False), ("val", 33, False), ("test", 15, False),
    ]  # fmt: skip
    (last,) = place.glob("run/evaluate/*/tables/evaluate_measured.csv")
    assert [*read_table(last)[0]] == ["figure", *["validation: 9 images", "test: 15 images", "later, all: 12 images"]]
    assert "test: 15 images: loss=" in (place / "said.txt").read_text()


def test_each_image_is_measured_once_by_a_run_that_did_not_see_it(place):
    rows = read_table(place / "run/tables/evaluate_folds_folds.csv")
    found = read_json(place / "run/metrics_folds.json")
    right = [float(row["top1"]) * float(row["samples"]) for row in rows]
    assert len(right) == 5 and found["measured"] == "5 folds: 33 images"
    assert found["top1"] == pytest.approx(sum(right) / 33)


def test_no_result_replaces_another(place):
    before = contents(place / "run")
    del before["log.txt"]
    words = ["run_dir=run", "weights=last", "per_image=true", *ON_CPU]
    for split in ("val", "test"):
        run("evaluate", [*words, f"split={split}"], place)
    assert before.items() <= contents(place / "run").items()
    assert {"images_last.parquet", "images_last_test.parquet"} <= {file.name for file in place.glob("run/tables/*")}


def test_the_card_says_which_images_its_figures_are_of(place):
    text = (place / "run/export/README.md").read_text()
    results = front_matter(text)["model-index"][0]["results"]
    assert [(each["dataset"]["split"], each["dataset"]["name"]) for each in results] == [
        ("validation", "9 images"), ("5 folds", "33 images"), ("test", "15 images"), ("later, all", "12 images"),
    ]  # fmt: skip
    assert "Measured on `test: 15 images`:" in text


def test_classes_of_the_test_split_alone_are_left_out_and_named(place, capsys):
    shutil.copytree(place / "photos", place / "more")
    shutil.move(place / "more/test/C", place / "more/test/see")
    run("evaluate", ["run_dir=run", "data.root=more/test", *ON_CPU], place)
    said = "10 of 15 images of split=all have a label that the weights know, and others have see"
    assert said in capsys.readouterr().err
    (file,) = place.glob("run/evaluate/best_weights-test-*/metrics.json")
    assert read_json(file)["measured"] == "test, all: 10 images"
