"""train.py as users type it: what a run of its own network leaves, and what it refuses."""

import csv
import json
import math

import pytest
from PIL import Image

from tests.in_process import configure, run
from utils.config.messages import ConfigError
from utils.io.files import read_json

# -------------------------------------------------------------------------------------------------------------- a run

COLOURS = ["black", "blue", "green", "red", "white", "yellow"]
CORRUPT, MISLABELLED = "black/0.png", "yellow/5.png"  # of training and of what is split off
SHORT = [
    "augment.image_size_hw=[32,32]", "loop.total_steps=120", "loop.global_batch_size=10", "lr_finder.max_share=1.0",
    "loop.evaluate_every_epochs=4", "model.name=test_resnet",
    "runtime.device=cpu", "runtime.threads=1", "runtime.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with folders of six colours, without val/, and a run of train.py on them."""
    folder = tmp_path_factory.mktemp("train")
    photos = folder / "photos"
    for colour in COLOURS:
        (photos / colour).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (36 + number, 36), colour).save(photos / colour / f"{number}.png")
    Image.new("RGB", (36, 36), "red").save(photos / MISLABELLED)
    (photos / CORRUPT).write_bytes((photos / CORRUPT).read_bytes()[:60])
    run("train", ["data=image_folder", "data.root=photos", "run_dir=run", *SHORT], folder)
    return folder


@pytest.fixture
def log(place):
    return (place / "run/log.txt").read_text()


def test_the_range_test_is_kept_and_its_rate_is_the_runs(place, log):
    found = read_json(place / "run/lr_finder.json")
    assert 18 < len(found["losses"]) <= 100 and f"takes {found['taken']:.3g}" in log
    assert found["taken"] in found["rates"]
    assert read_json(place / "run/checkpoints/step_00000120/state.json")["found_lr"] == found["taken"]


def test_a_corrupt_image_is_met_in_the_range_test_and_the_run_completes(place, log):
    rows = [json.loads(line) for line in (place / "run/unreadable.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [CORRUPT] and rows[0]["reason"]
    assert log.count(f"unreadable image {CORRUPT}: ") == 1
    met = log.index(f"unreadable image {CORRUPT}: ")
    assert met < log.index("lr_finder: takes") < log.index("finished: 120 steps in ")
    assert log.count("split off 6 of 36 images") == 1
    assert read_json(place / "run/complete.json") == {"step": 120}
    for name in ("lr_finder_plot", "curves", "confusion", "mistakes"):
        with Image.open(place / f"run/plots/{name}.png") as picture:
            assert min(picture.size) > 100


def test_the_training_log_has_a_row_for_each_epoch(place):
    with open(place / "run/training_log.txt", newline="") as stream:
        lines = list(csv.DictReader(stream))
    columns = ["epoch", "train_loss", "train_accuracy", "val_loss", "top1", "top5", "lr", "momentum", "images_per_sec"]
    columns += ["seconds", "peak_memory_gib"]
    assert [name for name in columns if name not in lines[0]] == []
    assert [int(line["step"]) for line in lines] == list(range(3, 121, 3))
    assert all(math.isfinite(float(line[name])) and float(line[name]) >= 0 for line in lines[3:] for name in columns)
    rates, momenta = ([float(line[name]) for line in lines] for name in ("lr", "momentum"))
    assert rates.index(max(rates)) == momenta.index(min(momenta)) == 11 and rates[-1] < rates[0]
    assert rates[11] == pytest.approx(read_json(place / "run/lr_finder.json")["taken"])  # the peak, at step 36


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED = ["init_from=runs/first", "task.head=kept", "optim.lr=0.1"]


@pytest.mark.parametrize("override", REFUSED)
def test_what_a_run_from_scratch_would_not_read_is_refused(override):
    with pytest.raises(ConfigError) as refused:
        configure("train", [override])
    (problem,) = refused.value.problems
    assert problem.startswith(f"{override.partition('=')[0]}: ")
