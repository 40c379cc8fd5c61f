"""A number for each image: a competition whose train.csv has another column, too (docs/numbers.md)."""

import numpy as np
import pytest
from PIL import Image

from tests.door.follow import follow
from tests.door.test_held_out import ON_CPU, SHORT
from tests.in_process import run
from tests.support import read_table, refuses
from utils.io.files import read_json

QUICK = {
    "train.py": [*SHORT[:-1], "loop.total_steps=5", "data.validation_fraction=0.25"],
    "evaluate.py": ON_CPU,
    "predict.py": ["device=cpu"],
}


def test_numbers_are_learned_measured_and_given_in_their_unit(tmp_path):
    tables = {"train": ["Id,Blur,score"], "test": ["Id,Blur"], "sample_submission": ["Id,score"]}
    draw = np.random.default_rng(0)
    lights = draw.integers(20, 230, 60)
    for number, light in enumerate(lights):
        split = "train" if number < 48 else "test"
        (tmp_path / "photos" / split).mkdir(parents=True, exist_ok=True)
        noisy = np.uint8(light + draw.integers(-15, 15, (16, 16, 3)))
        Image.fromarray(noisy).save(tmp_path / f"photos/{split}/n{number}.png")
        tables[split].append(f"n{number},{number % 2}" + f",{50 + light / 10}" * (0 < number < 48))
        tables["sample_submission"] += [f"n{number},0"] * (split == "test")
    for name, lines in tables.items():
        (tmp_path / f"photos/{name}.csv").write_text("\n".join(lines))
    follow("numbers.md", tmp_path, {"PHOTOS": "photos", "RUN": "run", "NEW": "photos/test"}, QUICK)
    measured = read_json(tmp_path / "run/metrics.json")
    assert measured["samples"] > 5 and measured["r2"] > 0.8 and measured["mae"] < 3
    found = [float(row["number"]) for row in read_table(tmp_path / "numbers.csv")]
    assert found == pytest.approx(50 + lights[48:] / 10, abs=4)

    words = "weights=run/export/model.onnx input=photos/test output=a.csv form=photos/sample_submission.csv device=cpu"
    run("predict", words.split(), tmp_path)
    assert [float(row["score"]) for row in read_table(tmp_path / "a.csv")] == pytest.approx(found, rel=1e-4)
    with refuses(r"^data\.root: .* 0 classes .* task=regression"):
        run("train", ["data.root=photos", *SHORT], tmp_path)
