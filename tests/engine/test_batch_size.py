"""Out of memory: micro-batches by shape, a run that halves them, what its folder keeps, ranks."""

import json

import pytest
import torch

from engine.batch_size import MicroBatches
from tests.engine.test_exactness import assert_same_tensors
from tests.in_process import TINY, make_images, run
from tests.support import checkpoint_tensors, common, rows, samples_by_step
from tests.support import run as run_process
from tests.tasks import troubled
from utils.errors import UserError


def test_sizes_are_halved_by_shape_and_kept_by_device(tmp_path):
    sizes = MicroBatches(12, halves=True)
    sizes.open(tmp_path, torch.device("cpu"))
    small, large = ({"weight": torch.arange(12), "images": torch.zeros(12, 3, side, side)} for side in (4, 8))
    sizes.halve("3x8x8", 12)
    sizes.halve("3x8x8", 6)
    parts = sizes.split([small, large])
    assert [len(part["weight"]) for part in parts] == [12, 3, 3, 3, 3] and sizes.smallest == 3
    assert torch.equal(torch.cat([part["weight"] for part in parts[1:]]), large["weight"])
    file = tmp_path / "batch_size.json"
    assert json.loads(file.read_text()) == {"cpu": {"3x8x8": 3}}
    again = MicroBatches(8, halves=True)
    again.open(tmp_path, torch.device("cpu"))
    assert len(again.split([{name: tensor[:8] for name, tensor in large.items()}])[0]["weight"]) == 2  # a divisor of 8
    for content in ("{}x", '{"cpu": 3}', '{"cpu": {"3x8x8": 0}}'):
        file.write_text(content)
        with pytest.raises(UserError, match="^loop.batch_size: .*batch_size.json is damaged"):
            again.open(tmp_path, torch.device("cpu"))


@pytest.fixture
def little_memory(monkeypatch):
    """Return a function that lets this process's device take so many samples at once."""
    for target in troubled.PATCHED:
        monkeypatch.setattr(*target, getattr(*target))
    return lambda size: troubled.start("little_memory", size)


AUTO = ["loop.global_batch_size=8", "loop.batch_size=auto", "loop.total_steps=3", "loop.ema_decay=0.9"]


def test_a_run_that_runs_out_equals_one_of_the_size_found_and_keeps_it(tmp_path, little_memory):
    base = [*TINY, f"data.root={make_images(tmp_path / 'images')}", *AUTO, "model.drop_path_rate=0.2"]
    little_memory(3)
    run("finetune", [*base, "run_dir=auto"], tmp_path)
    run("finetune", [*base, "run_dir=two", "loop.batch_size=2"], tmp_path)
    assert_same_tensors(checkpoint_tensors(tmp_path / "auto", 3), checkpoint_tensors(tmp_path / "two", 3))
    assert rows(tmp_path / "auto/metrics.jsonl") == rows(tmp_path / "two/metrics.jsonl")
    assert list(json.loads((tmp_path / "auto/batch_size.json").read_text())["cpu"].values()) == [2]
    said = (tmp_path / "auto/log.txt").read_text()
    assert said.count("out of memory") == 2 and "memory at the first step: weights" in said
    run("finetune", [*base, "run_dir=auto", "loop.total_steps=4"], tmp_path)
    assert (tmp_path / "auto/log.txt").read_text().count("out of memory") == 2  # a resumed run begins with what is kept

    with pytest.raises(UserError, match=r"^loop.batch_size: .*in training, with 8 samples of 3x\d+x\d+ at once"):
        run("finetune", [*base, "run_dir=stopped", "loop.on_out_of_memory=stop"], tmp_path)
    little_memory(0)
    with pytest.raises(UserError, match="^loop.batch_size: .*with 1 samples"):
        run("finetune", [*base, "run_dir=none"], tmp_path)


def test_an_evaluation_that_runs_out_is_named(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("engine.tasks.classification.ClassificationTask.evaluate", full)
    base = [*TINY, f"data.root={make_images(tmp_path / 'images')}", *AUTO, "run_dir=run"]
    with pytest.raises(UserError, match="^loop.batch_size: .*in step 1: evaluating"):
        run("finetune", base, tmp_path)


def test_ranks_agree_on_the_smallest(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "run", *AUTO, "loop.global_batch_size=24")
    trouble = {"TROUBLE": "little_memory 9 3"}
    said = run_process("tests/tasks/troubled.py", overrides, tmp_path, ranks=2, variables=trouble)
    assert said.count("from now on 3") == 2  # and they train together, each with half of every batch
    assert [len(pairs) for pairs in samples_by_step(tmp_path / "run").values()] == [24] * 3
    assert list(json.loads((tmp_path / "run/batch_size.json").read_text())["cpu"].values()) == [3]
