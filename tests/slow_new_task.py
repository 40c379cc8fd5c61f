"""docs/new_task.md, followed word by word in a copy of the program: what it says to write is written, and trains."""

import csv
import re
import shlex
import shutil
import subprocess

import pytest

from tests.support import ROOT, make_collection, read_table, rows, run
from utils.io.files import read_json

PAGE = (ROOT / "docs/new_task.md").read_text("utf-8")
SHORT = [
    "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]",
    "loop.total_steps=4", "loop.batch_size=8", "runtime.threads=1", "runtime.precision=fp32",
]  # fmt: skip


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def insert(file, before, text):
    whole = file.read_text()
    assert whole.count(before) == 1, before
    file.write_text(whole.replace(before, text + before))


def start(program, line, *more):
    script, *words = shlex.split(line)[1:]
    run(str(program / script), [*words, *more], program)


def test_the_page_builds_a_kind_that_every_command_knows(tmp_path):
    program = tmp_path / "program"
    for name in subprocess.check_output(["git", "ls-files", "*.py", "*.yaml", "conf"], cwd=ROOT, text=True).split():
        (program / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, program / name)
    schema, task, kind, entry, output = blocks("python")
    insert(program / "engine/tasks/config.py", "class ClassificationTaskConfig", f"{schema}\n\n")
    (program / "engine/tasks/score.py").write_text(f"{task}\n\n{kind}")
    (program / "conf/task/score.yaml").write_text(*blocks("yaml"))
    insert(program / "engine/tasks/kinds.py", '    "diffusion": KindRow(', entry)
    insert(program / "models/outputs.py", '    "features": Output(', output)

    images = make_collection(program / "PATH")
    files = sorted(file.relative_to(images) for file in images.rglob("*.png"))
    table = [("path", "split", "score"), *((file, file.parts[0], len(file.stem) % 3 + 0.5) for file in files)]
    with open(images / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)

    train, evaluate, predict = blocks("bash")[0].splitlines()
    start(program, train, *SHORT)
    measured = rows(program / "outputs/score/metrics.jsonl", "evaluate")[-1]
    start(program, evaluate, "runtime.precision=fp32", "output=found")
    found = read_json(program / "found/metrics.json")
    for name in ("loss", "mean_absolute_error"):
        assert found[name] == pytest.approx(measured[name], rel=1e-5)
    start(program, predict)
    predicted = read_table(program / "outputs/score/scores.csv")
    assert len(predicted) == len(files) and all(float(row["score"]) for row in predicted)
