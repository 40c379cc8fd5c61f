"""What evaluations leave for people to look at: counts at thresholds, the newest tables, the worst images."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from utils.record.tables import find_tables, read_decisions, read_newest, reliability, to_cell, worst_images


def write(run, **texts):
    (run / "tables").mkdir(exist_ok=True)
    for name, text in texts.items():
        (run / f"tables/{name}.csv").write_text(text)
    return run


def test_decisions_and_their_reliability(tmp_path):
    text = "group,positives,threshold,predicted,correct,precision,recall,f1\n"
    text += "".join(f"all,5,{level / 100},{100 - level},{50 - level // 2},0.5,0.25,0.4\n" for level in range(80))
    text += "".join(f"rating,1,{level / 100},0,0,0,0,0\n" for level in range(100))
    found = read_decisions(write(tmp_path, decisions=text))
    assert found["all"][:, 10].tolist() == [0.1, 90, 45, 0.5, 0.25, 0.4] and found["rating"].shape == (6, 100)
    middle, correct = reliability(found["all"])  # the last tenth has all from its threshold on
    assert middle == pytest.approx(np.arange(8) / 10 + 0.05) and correct == pytest.approx(np.full(8, 0.5))
    assert reliability(found["rating"]).shape == (2, 0)
    for cut in ("all,5,0.9", "all,5,x,1,1,1,1,1"):
        with pytest.raises(ValueError, match="shorter|float"):
            read_decisions(write(tmp_path, decisions=text + cut))


@pytest.mark.parametrize(
    "text, cell",
    [("007", "007"), ("12", 12), ("-0.25", -0.25), ("0.123456", 0.1235), ("", None), ("nan", "nan"), ("1_0", "1_0")],
)
def test_cells(text, cell):
    assert to_cell(text) == cell and type(to_cell(text)) is type(cell)


def test_the_newest_table_of_a_name_and_no_link_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write(run, classes="a\n1\n", evaluate_classes="b\n2\n", other="c", another="d")
    (tmp_path / "secret.csv").write_text("secret")
    (run / "tables/link.csv").symlink_to(tmp_path / "secret.csv")
    os.utime(run / "tables/evaluate_classes.csv", (1, 1))
    assert {name: file.stem for name, file in find_tables(run).items()} == {
        "classes": "classes", "another": "another", "other": "other",
    }  # fmt: skip
    assert next(iter(find_tables(run))) == "classes"
    assert read_newest(run, "classes") == [{"a": "1"}] and read_newest(run, "tags") == []
    os.utime(run / "tables/classes.csv", (0, 0))
    assert read_newest(run, "classes") == [{"b": "2"}]


def test_the_worst_images_of_all_and_of_a_pair(tmp_path):
    run = write(tmp_path)
    assert worst_images(run, 9) is None
    columns = {
        "path": list("abcd"),
        "label": list("xyxx"),
        "prediction": list("yyyz"),
        "wrong": [True, False, True, True],
    }
    pq.write_table(pa.table({**columns, "rank": [3, 4, 1, 2]}), run / "tables/images.parquet")
    assert [row["path"] for row in worst_images(run, 2)] == ["c", "d"]
    assert [row["path"] for row in worst_images(run, 9, ("x", "y"))] == ["c", "a"]
    pq.write_table(pa.table({"path": list("ab"), "wrong": [["t"], []], "rank": [2, 1]}), run / "tables/images.parquet")
    assert [row["path"] for row in worst_images(run, 9)] == ["b", "a"]
    (run / "tables/images.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="arquet"):
        worst_images(run, 9)
