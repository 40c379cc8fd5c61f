"""A Kaggle folder: train.csv, train/, test/ without labels, sample_submission.csv, a zip (docs/competition.md).

Its table has rows without an image (docs/table.md).
"""

from tests.door.follow import follow
from tests.door.test_held_out import ON_CPU, SHORT
from tests.in_process import run
from tests.support import make_collection, read_table, refuses

QUICK = {"train.py": SHORT[:-1], "evaluate.py": ON_CPU, "predict.py": ["device=cpu"]}


def test_a_competition_ends_with_a_submission_in_its_form(tmp_path, log, capsys):
    made = make_collection(tmp_path / "made", per_class=10, validation=2)
    root = tmp_path / "dogs"
    lines = ["id,breed"]
    for split, name in (("train", "train"), ("val", "test")):
        (root / name).mkdir(parents=True)
        for number, file in enumerate(sorted(made.glob(f"{split}/*/*.png"))):
            file.rename(root / name / f"{name[:2]}{number:03}.png")
            lines += [f"tr{number:03},breed {file.parent.name}"] * (name == "train")
    lines += [f"gone{number},breed B" for number in range(6)]
    (root / "train.csv").write_text("\n".join(lines))
    ids = [f"te{number:03}" for number in (5, 3, 4, 0, 1, 2)]
    (root / "sample_submission.csv").write_text("\n".join(["id,breed", *(f"{each},breed A" for each in ids)]))
    (root / "dogs.zip").write_bytes(b"PK")
    follow("competition.md", tmp_path, {"PHOTOS": "dogs", "RUN": "run"}, QUICK)
    assert "train.csv: column id names 30 of 30 files in train/, such as tr000 for tr000.png; label: breed" in log.text
    assert "dogs.zip" in log.text
    words = "input=dogs/test output=submission.csv form=dogs/sample_submission.csv"
    assert f"predict.py weights=run {words}" in capsys.readouterr().err
    with refuses(f"split: 0 of 6 .* are predicted: .*{words}"):
        run("evaluate", ["run_dir=run", "split=test", *ON_CPU], tmp_path)
    rows = read_table(tmp_path / "submission.csv")
    assert [row["id"] for row in rows] == ids and {row["breed"] for row in rows} <= {"breed A", "breed B", "breed C"}

    follow("table.md", tmp_path, {"PHOTOS": "dogs", "RUN": "table"}, QUICK)
    assert "6 rows of train.csv without an image: gone0, gone1" in log.text
    assert "gone5" in next(tmp_path.glob("outputs/care/*-*/check.jsonl")).read_text()
    assert len(read_table(tmp_path / "classes.csv")) == 36
