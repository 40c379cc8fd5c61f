"""job=split. Properties: every label has its share, nearer than by chance; groups stay whole; the same result again."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.care.split import stratify
from tests.data.test_duplicates import COPIES, picture
from tests.in_process import run
from utils.errors import UserError

FOLDER = ["data=image_folder", "data.root=images", "data.validation_fraction=0.25"]


def made(rows, width, generator):
    """Labels by a power law, a few of each row."""
    has = generator.random((rows, width)) < 0.5 / np.arange(1, width + 1)
    return np.nonzero(has)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_every_label_has_its_share(fraction):
    units, labels = made(3000, 60, np.random.default_rng(0))
    chosen = stratify(units, labels, np.ones(3000, int), fraction)
    totals, ours = np.bincount(labels), np.bincount(labels[chosen[units]], minlength=60)
    assert np.abs(ours - fraction * totals).max() <= 3 and abs(chosen.sum() - 3000 * fraction) <= 3
    assert (ours[totals >= 2 / fraction] > 0).all()
    drawn = np.random.default_rng(1).random(3000) < fraction
    by_chance = np.bincount(labels[drawn[units]], minlength=60)
    assert np.abs(ours - fraction * totals).mean() < np.abs(by_chance - fraction * totals).mean() / 4
    assert (stratify(units, labels, np.ones(3000, int), fraction) == chosen).all()


def test_units_of_several_images_count_as_many():
    sizes = np.array([50] + [1] * 150)
    units, labels = np.arange(151).repeat(sizes), np.zeros(200, int)
    chosen = stratify(units, labels, sizes, 0.25)
    assert sizes[chosen].sum() == 50
    without = stratify(np.array([], int), np.array([], int), sizes, 0.25)
    assert sizes[without].sum() == 50


def test_a_manifest_gets_its_split(tmp_path):
    root = tmp_path / "images"
    for number in range(24):
        file = root / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 12).save(file) if number < 12 else COPIES["mirrored"](picture(number % 12)).save(file)
        file.with_suffix(".txt").write_text("x, y" if number % 3 else "z")
    Image.new("L", (3, 3)).save(root / "a/cut.png")
    (root / "a/cut.png").write_bytes((root / "a/cut.png").read_bytes()[:20])
    words = ["job=split", *FOLDER]
    with pytest.raises(UserError, match=r"^data.root: .* column group"):
        run("prepare", words, tmp_path)
    run("prepare", ["job=manifest", "duplicates=true", *FOLDER], tmp_path)
    before = (root / "manifest.parquet").read_bytes()
    assert run("prepare", words, tmp_path).startswith("6 of 24 images for validation; set apply=true")
    run("prepare", [*words, "apply=true"], tmp_path)
    table = pq.read_table(root / "manifest.parquet").to_pydict()
    val = {path for path, split in zip(table["path"], table["split"]) if split == "val"}
    assert len(val) == 6 and "a/cut.png" not in val and sum(path < "b" for path in val) in (2, 4)
    sides = {}
    for group, split in zip(table["group"], table["split"]):
        sides.setdefault(group, set()).add(split)
    assert len(sides) == 13 and all(len(found) == 1 for found in sides.values())
    (journal,) = (root / ".atelier").glob("*.jsonl")
    run("prepare", ["job=undo", *FOLDER, f"source={journal}"], tmp_path)
    assert (root / "manifest.parquet").read_bytes() == before
    with pytest.raises(UserError, match=r"^data.validation_fraction: 0.0"):
        run("prepare", [*words, "data.validation_fraction=0.0"], tmp_path)
