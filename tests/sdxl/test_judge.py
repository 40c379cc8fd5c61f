"""task.judge: what a tagger sees in pictures of held-out captions; loop.best; evaluate.py; refusals."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

from engine.exports.weights import load_predictor
from sdxl.config import JudgeConfig
from sdxl.judge import Held, Judge, prepare
from sdxl.judging import Seen, judge_pictures, tag_rows
from tests.in_process import SHORT as SMALL_RUN
from tests.in_process import SMALL_MODEL, run, run_command, run_until_killed
from tests.support import TINY, read_table, rows, start
from tests.test_arena import write_colours, write_wd
from utils.io.files import read_json

SHORT = [
    *TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "optim.lr=0.05",
    "loop.total_steps=3", "loop.batch_size=4", "loop.micro_batch_size=4", "loop.evaluate_every_epochs=0.5",
    "loop.checkpoint_every_steps=1", "data.root=images", "task.captions.caption_dropout=0",
    "loop.best=judge.similarity",
]  # fmt: skip
JUDGE = "task.judge={{weights: {}, prompts: 3}}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 15 tagged images of three colours, a tagger of the WD form, and a judged run in `run`."""
    folder = tmp_path_factory.mktemp("judge")
    for path, _ in write_colours(folder / "images", {"train": 3, "val": 2}, height=64, step=8):
        path.with_suffix(".txt").write_text(f"{path.parent.name}, extra")
    write_wd(folder / "wd", scale=80.0)
    run("finetune_sdxl", [*SHORT, JUDGE.format("wd"), "run_dir=run"], folder)
    return folder


def judged(folder):
    found = rows(folder / "metrics.jsonl", "evaluate")
    return [{name: value for name, value in row.items() if name.startswith("judge")} for row in found]


def test_a_run_is_judged_and_its_figure_chooses_the_checkpoint(place):
    figures, log = judged(place / "run"), (place / "run/log.txt").read_text()
    names = ("recall", "real_recall", "leakage", "similarity", "novelty")
    assert {f"judge.{name}" for name in names} == figures[0].keys()
    assert all(row["judge.real_recall"] == 1 for row in figures) and figures[0] != figures[-1]
    assert "3 prompts with 3 tags" in log and "1 of the 4 tags" in log and "'extra'" in log
    assert "less than 0.6 are equal" in log
    best = read_json(place / "run/result.json")
    last = figures[-1]["judge.novelty"]
    assert f"  judge.novelty {last:.4g}  best judge.similarity {best['value']:.4g} at epoch" in log
    assert best["metric"] == "judge.similarity" and not best["is_lowest_best"]
    assert best["value"] == max(row["judge.similarity"] for row in figures)
    table = {row["tag"]: row for row in read_table(place / "run/tables/judge.csv")}
    assert {tag: (row["prompted"], row["seen_in_real"]) for tag, row in table.items()} == dict.fromkeys(
        ("red", "Green", "blue"), ("1", "1")
    )
    nearest = read_table(place / "run/tables/judge_nearest.csv")
    assert len(nearest) == 3 and all((place / "images" / row["training_image"]).is_file() for row in nearest)
    assert all("train" in row["training_image"] for row in nearest)
    assert (place / "run/plots/judge.png").is_file()


def test_a_killed_run_and_evaluate_give_the_same_figures(place):
    whole, words = judged(place / "run")[-1], [*SHORT, JUDGE.format("wd"), "run_dir=killed"]
    run_until_killed("finetune_sdxl", words, place, 2)
    run("finetune_sdxl", words, place)
    assert judged(place / "killed")[-1] == whole
    run("evaluate", ["run_dir=killed", "weights=last", "runtime.device=cpu", "runtime.threads=1"], place)
    measured = read_json(place / "killed/metrics_last.json")
    assert {name: measured[name] for name in whole} == whole


def test_two_ranks_judge_as_one(place):
    """With a text cache, so that the text encoders are loaded for the pictures."""
    words = [*SHORT, JUDGE.format("wd"), "loop.total_steps=0", "task.text_cache=texts", "run_dir=one"]
    run("finetune_sdxl", words, place)
    start("finetune_sdxl.py", [*words, "run_dir=two"], place, ranks=2).wait()
    assert judged(place / "two") == judged(place / "one") != []


@pytest.mark.parametrize(
    "words, said",
    [
        ([JUDGE.format("cats")], "task.judge.weights: wd"),
        ([JUDGE.format("images")], "task.judge.weights: "),
        (
            [JUDGE.format("wd"), "loop.best=judge.recal"],
            "loop.best: judge.recal is no figure of this run; close: judge",
        ),
        (["loop.best=judge.recall"], "loop.best: judge.recall"),
    ],
)
def test_what_is_refused(place, words, said, monkeypatch, capsys):
    write_wd(place / "cats", [(9, "general"), (0, "cat")], (0, 0))
    assert run_command("finetune_sdxl", [*SHORT, *words, "run_dir=refused", "dry_run=true"], place, monkeypatch) == 2
    error = capsys.readouterr().err
    assert said.replace("wd", "cats") in error
    assert "cats" not in words[0] or "'blue', 'extra'" in error or "'red'" in error


def test_a_tagger_of_ours_sees_what_predict_sees(place, caplog):
    words = ["data=image_folder", "data.root=images", "task=tagging", "task.min_count=1", "run_dir=ours"]
    run("train", [*SMALL_MODEL, *SMALL_RUN, *words], place)
    judge = Judge(JudgeConfig(weights=str(place / "ours"), prompts=1))
    pictures = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), np.uint8)
    images = [prepare(picture, judge.preprocessing) for picture in pictures]
    seen, predictor = judge.look(images, torch.device("cpu")), load_predictor(judge.path, torch.device("cpu"))
    np.testing.assert_allclose(seen.vectors, predictor.embed(torch.stack(images)), rtol=1e-4, atol=1e-5)
    assert (seen.tags == (predictor.predict(torch.stack(images)) >= 0.35)).all() and not judge.state_dict()
    trained = {f"{number}.png": torch.from_numpy(vector) for number, vector in enumerate(seen.vectors[:2])}
    tags = np.ones(len(judge.names), bool)
    held = [Held(row, "a caption", tags, ~tags, images[2]) for row in range(2)]
    report = judge.report(held, [pictures[1], pictures[0]], trained, torch.device("cpu"))
    assert "probably copies" in caplog.text
    assert report.scalars["judge.novelty"] < 1e-3
    assert [row["training_image"] for row in report.tables["judge_nearest"]] == ["1.png", "0.png"]


def test_the_figures_of_three_pictures():
    """Tags a, b, c: recall 2 of 3; c is seen unprompted once in drawn pictures, b once in real ones."""
    prompted, others = np.eye(3, dtype=bool), ~np.eye(3, dtype=bool)
    drawn = Seen(np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool), np.array([[3.0, 0], [0, 3], [0, 3]]))
    real = Seen(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1]], bool), np.array([[3.0, 0], [0, 3], [3, 3]]))
    figures = judge_pictures(prompted, others, drawn, real)
    same = judge_pictures(prompted, others, real, real)["similarity"]
    assert figures.pop("similarity") < 1 == pytest.approx(same)
    assert figures == {"recall": 2 / 3, "real_recall": 1, "leakage": 0}
    assert tag_rows("abc", prompted, others, drawn, real)[2] == {
        "tag": "c", "prompted": 1, "seen": 0, "seen_in_real": 1, "leaked": 1, "leaked_in_real": 0,
    }  # fmt: skip
