"""Collections of a few images train by every script, without validation images unless these are asked for. Each image
of an evaluation has a row."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.in_process import run
from tests.support import TINY, refuses
from utils.io.files import read_json

ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.workers=0"]
SHORT = [*ON_CPU, "loop.total_steps=2", "data=image_folder", "data.root=in", "run_dir=run"]
SMALL = [*SHORT, "augment.image_size_hw=[32,32]"]
SCRIPTS = {
    "train": ("train", [*TINY["classification"], *SMALL]),
    "tagging": ("finetune", [*TINY["tagging"], *SMALL]),
    "fcmae": ("pretrain_fcmae", [*TINY["fcmae"], *SMALL]),
    "vae": ("finetune_vae", [*TINY["autoencoder"], *SHORT]),
    "sdxl": ("finetune_sdxl", [*TINY["diffusion"], *SHORT]),
}
TENTH = ["data.validation_fraction=0.1"]


def fill(root, layout, count):
    """Write images, of two classes or in one folder, with captions of two tags."""
    for number in range(count):
        file = root / "cd"[number % 2] / f"{number}.png" if layout == "classes" else root / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"blue, tag {number % 2}")


def evaluate(folder, *words):
    return run("evaluate", ["run_dir=run", *ON_CPU, *words], folder)


@pytest.mark.parametrize(
    "script, layout, count, words, is_validated",
    [
        ("train", "classes", 2, [], False),
        ("train", "classes", 3, TENTH, True),  # the single image of the other class is for training
        ("train", "classes", 10, [], False),
        ("tagging", "flat", 1, TENTH, False),
        ("tagging", "flat", 2, TENTH, True),
        ("fcmae", "flat", 1, [], False),
        ("sdxl", "flat", 1, ["task.samples.prompts=[a]"], False),
        ("vae", "flat", 1, [], False),
        ("vae", "flat", 2, TENTH, True),
    ],
)
def test_a_few_images_train_by_every_script(script, layout, count, words, is_validated, tmp_path, capsys):
    fill(tmp_path / "in", layout, count)
    name, settings = SCRIPTS[script]
    run(name, [*settings, *words], tmp_path)
    weights = {file.name.split("_")[0] for file in (tmp_path / "run/weights").iterdir()}
    assert weights == ({"best", "last"} if is_validated else {"last"})
    said = capsys.readouterr().err
    assert ("no validation images" in said) != is_validated
    assert ("python evaluate.py run" in said) == is_validated
    assert ("  judged  " in said and "frozen features has top-1 " in said) == (script == "train")
    if script == "sdxl":
        assert "python export.py format=kohya run_dir=run" in said
        assert (tmp_path / "run/plots/samples.png").exists() == bool(words)
    run(name, [*settings, *words], tmp_path)
    assert "the run is complete: 2 of 2" in capsys.readouterr().err
    if (script, count) == ("tagging", 2):  # one validation image
        with refuses("^calibrate: .* one half has no image"):
            evaluate(tmp_path, "calibrate=true")
    if not is_validated:
        with refuses("^split: in has no image of split=val"):
            evaluate(tmp_path, "batch_size=4")
        assert "run has no best weights, because it was not evaluated" in capsys.readouterr().err
        evaluate(tmp_path, "batch_size=4", "split=train")
        assert read_json(tmp_path / "run/metrics_train.json")["split"] == "train"


def test_a_validation_image_without_a_bucket_ends_no_run(tmp_path, capsys):
    fill(tmp_path / "in/train", "flat", 2)
    (tmp_path / "in/val").mkdir()
    Image.new("RGB", (400, 20)).save(tmp_path / "in/val/long.png")
    name, settings = SCRIPTS["sdxl"]
    run(name, settings, tmp_path)
    said = capsys.readouterr().err
    assert "long.png" in said and "no validation images" in said


# ------------------------------------------------------------------------------------------------ a row for each image


def images_of(place, split="val"):
    return pq.read_table(place / f"run/tables/images{'' if split == 'val' else f'_{split}'}.parquet").to_pylist()


def test_a_classifier_has_a_row_for_each_image(tmp_path):
    fill(tmp_path / "in", "classes", 12)
    name, settings = SCRIPTS["train"]
    run(name, [*settings, *TENTH], tmp_path)
    words = ["runtime.precision=fp32", "batch_size=5", "per_image=true"]
    for split, count in (("val", 2), ("all", 12)):
        evaluate(tmp_path, *words, f"split={split}")
        rows = images_of(tmp_path, split)
        file = "metrics.json" if split == "val" else f"metrics_{split}.json"
        figures = read_json(tmp_path / "run" / file)
        assert len(rows) == count and [row["path"] for row in rows] == sorted(row["path"] for row in rows)
        assert np.mean([row["loss"] for row in rows]) == pytest.approx(figures["loss"], rel=1e-5)
        assert np.mean([not row["wrong"] for row in rows]) == figures["top1"]
        assert [row["rank"] for row in sorted(rows, key=lambda row: -row["loss"])] == list(range(1, count + 1))
        for row in rows:
            assert row["label"] == row["path"][0] and row["wrong"] == (row["label"] != row["prediction"])
            assert 0.5 <= row["probability"] <= 1
    with refuses("split: train has images that were trained on"):
        evaluate(tmp_path, *words, "split=train", "calibrate=true", "risk=0.05")


def test_other_images_have_a_split_of_their_own_and_the_same_folder_is_the_runs(tmp_path):
    """Other images as a whole, and what stays of the run: tests/door/test_held_out.py."""
    for name in ("in", "test", "apart/train", "apart/val"):
        fill(tmp_path / name, "classes", 12)
    name, settings = SCRIPTS["train"]
    run(name, [*settings, *TENTH], tmp_path)
    half = "data.validation_fraction=0.5"
    for words, samples in ((["data.root=test", "split=val", half], 6), (["data.root=apart"], 12)):
        evaluate(tmp_path, *words)
        (file,) = (tmp_path / "run/evaluate").glob(f"best_weights-{words[0].partition('=')[2]}-*/metrics*.json")
        assert read_json(file)["samples"] == samples
    evaluate(tmp_path, f"data.root=../{tmp_path.name}/in", half)
    again = read_json(tmp_path / "run/metrics.json")
    assert again["samples"] == 2 and "data" not in again


def test_a_tagger_has_a_row_for_each_image_at_its_thresholds(tmp_path):
    fill(tmp_path / "in", "flat", 12)
    name, settings = SCRIPTS["tagging"]
    run(name, settings, tmp_path)
    for split in ("train", "test"):
        with refuses(f"split: {split}"):
            evaluate(tmp_path, f"split={split}", "calibrate=true")
    with refuses(r"risk: 0\.05, but it is for calibrate=true of a classifier, .* tags of an image are not independent"):
        evaluate(tmp_path, "calibrate=true", "risk=0.05")
    evaluate(tmp_path, "batch_size=5", "per_image=true", "split=all")
    for number, row in enumerate(sorted(images_of(tmp_path, "all"), key=lambda row: int(row["path"].split(".")[0]))):
        tags, found = set(row["tags"]), set(row["prediction"])
        assert tags == {"blue", f"tag_{number % 2}"} and len(row["probability"]) == len(found)
        assert all(prob >= 0.35 for prob in row["probability"])
        assert set(row["wrong"]) == found - tags and set(row["missed"]) == tags - found
        probs = dict(zip(row["prediction"], row["probability"]))
        assert row["wrong_by"] == pytest.approx([probs[tag] - 0.35 for tag in row["wrong"]], abs=1e-6)
        assert len(row["missed_by"]) == len(row["missed"]) and all(0 < by <= 0.35 for by in row["missed_by"])
