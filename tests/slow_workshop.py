"""The stages of conf/workshop.yaml, with so few steps that their figures mean nothing. A second call repeats none."""

import pytest

from bench import tiny_sdxl
from tests.in_process import configure
from tests.support import run
from tests.test_workshop import Page, work
from utils.io.files import read_json
from workshop import Stage

SHORT = "loop.total_steps=2 loop.batch_size=8 runtime.threads=1"
MORE = {
    "pretrain": SHORT,
    "tagger": f"{SHORT} task.min_count=1",
    "sdxl": f"{SHORT} loop.micro_batch_size=8 task.chunk=8 task.judge.prompts=2 task.judge.steps=2",
}


def test_the_recipe_runs_through_and_nothing_is_repeated(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    monkeypatch.setattr(tiny_sdxl, "_EACH", 1)
    monkeypatch.setattr(tiny_sdxl, "_TAGGED_EVERY", 2)

    def run_stage(name, words):  # in a fork: the imports of ten processes take longer than the stages
        run(words[0], words[1:], tmp_path, variables={"CURVES": "drawn"})
        return 0.5

    monkeypatch.setattr("workshop.run_stage", run_stage)
    tiny_sdxl.write_tagged(tmp_path / "Anna's images")
    stages = configure("workshop", ["data.root=x"])[0].stages
    stages = {
        name: Stage(command=f"{stage.command} {MORE.get(name, '')}".replace(" 250 ", " 2 "), leaves=stage.leaves)
        for name, stage in stages.items()
    }
    work(stages, tmp_path)
    page, finished = Page((tmp_path / "run/report.html").read_text()), read_json(tmp_path / "run/stages.json")
    assert [*finished] == [*stages] and {"sdxl: judge.png", "pretrain: curves.png"} <= {*page.pictures}
    assert "calibrate: metrics.json" in page.text and "mAP" in page.text
    texts = [len(list((tmp_path / folder).glob("*.txt"))) for folder in ("run/images", "Anna's images")]
    assert texts == [80, 40]
    assert work(stages, tmp_path) and read_json(tmp_path / "run/stages.json") == finished
