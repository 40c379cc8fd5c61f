"""`train.py curve=true`: its runs, the law, the prediction and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from engine.judging import curve
from tests.in_process import TINY, run
from tests.support import make_collection, refuses
from utils.io.files import read_json, write_json
from utils.record.run_reader import RESULT_FILE

IMAGES = [250, 500, 1000]


@pytest.mark.parametrize("law", [(0.1, 5.0, 0.5), (0.0, 5.0, 0.5), (0.2, 20.0, 0.9), (0.3, 0.0, 1.0)])
def test_a_law_is_recovered_from_three_errors(law):
    images, (a, b, c) = np.array(IMAGES), law
    found = curve.fit_law(images, a + b * images**-c)
    assert found[0] + found[1] * 2000 ** -found[2] == pytest.approx(a + b * 2000**-c, abs=1e-6)
    assert b == 0 or found == pytest.approx(law, abs=1e-3)


def result(value, lowest=False):
    return {"metric": "top1", "value": value, "is_lowest_best": lowest}


@pytest.mark.parametrize(
    ("values", "lowest", "low", "high"),
    [
        ((0.5, 0.6, 0.65), False, 0.6749, 0.6751),  # 0.7 - 50 / n
        ((0.5, 0.4, 0.2), True, 0.1, 0.2),  # no law: bounded
        ((0.5, 0.55, 0.6), True, 0.5, 0.6),
        ((4.0, 2.0, 1.0), True, 0.0, 1.0),
    ],
)
def test_the_prediction_for_twice_the_images(values, lowest, low, high):
    found = curve.fit_curve(IMAGES, [result(value, lowest) for value in values])
    assert found["twice"]["images"] == 2000 and low <= found["twice"]["value"] <= high
    assert all(value >= 0 for value in found["law"].values())


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that are started; each leaves a result."""
    started = []

    def run_jobs(jobs, settings, script):
        started.extend(jobs)
        for number, job in enumerate(started):
            Path(job.folder).mkdir(parents=True, exist_ok=True)
            write_json(Path(job.folder) / RESULT_FILE, result(0.5 + 0.1 * number))
        return dict.fromkeys(started, 0)

    monkeypatch.setattr(curve, "run_jobs", run_jobs)
    return started


WORDS = [*TINY, "lr_finder.enabled=false", "curve=true", "run_dir=run"]


def test_the_runs_are_the_command_with_fewer_images_and_the_curve_is_in_its_folder(jobs, tmp_path):
    words = [*WORDS, f"data.root={make_collection(tmp_path / 'images', per_class=16, classes='AB', validation=2)}"]
    assert run("train", [*words, "dry_run=true"], tmp_path).endswith("the curve: 8, 16, 32 images") and not jobs
    line = run("train", words, tmp_path)
    assert [job.folder for job in jobs] == ["run/curve_25", "run/curve_50", "run"]
    assert "twice as many would give" in line
    plain = {*words} - {"curve=true", "run_dir=run"}
    given = [{word for word in job.words if not word.startswith("data.root")} for job in jobs]
    assert [words - plain for words in given] == [
        {"loop.per_class=0.25", "run_dir=run/curve_25"}, {"loop.per_class=0.5", "run_dir=run/curve_50"},
        {"run_dir=run"},
    ]  # fmt: skip
    found = read_json(tmp_path / "run/learning_curve.json")
    assert [row["images"] for row in [*found["runs"], found["twice"]]] == [8, 16, 32, 64]
    assert (tmp_path / "run/plots/learning_curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "per_class", "said"),
    [
        (["loop.count=9"], 16, r"curve: loop\.count=9 .*per_class"),
        (["loop.per_class=8"], 16, "curve: 25% of the labels are 2 images of a class; 4 are needed"),
        (["loop.total_steps=0"], 16, r"curve: .*loop\.total_steps=0"),
        (["data.validation_fraction=0"], 0, "curve: .* no validation images"),
    ],
)
def test_what_has_no_curve_is_refused(more, per_class, said, jobs, tmp_path):
    root = make_collection(
        tmp_path / "images", per_class=per_class or 16, classes="AB", validation=2 if per_class else 0
    )
    with refuses(said):
        run("train", [*WORDS, f"data.root={root}", *more], tmp_path)
    assert not jobs and not (tmp_path / "run").exists()
