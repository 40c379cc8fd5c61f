"""Out of memory: smaller micro-batches, a run that halves them, ranks."""

import pytest
import torch

from data.stream.loader import TrainStream
from engine.tasks.classification import ClassificationTask
from engine.update.batch_size import MicroBatches
from engine.update.learner import Learner
from tests.in_process import TINY, make_images, run
from tests.support import assert_equal_runs, common, refuses
from tests.support import run as run_process
from tests.tasks import troubled


def test_batches_are_split_to_divisors():
    batch = {"weight": torch.arange(12), "images": torch.zeros(12, 3, 8, 8)}
    parts = MicroBatches(3).split([batch, {name: tensor[:8] for name, tensor in batch.items()}])
    assert [len(part["weight"]) for part in parts] == [3] * 4 + [2] * 4
    assert torch.equal(torch.cat([part["weight"] for part in parts[:4]]), batch["weight"])


AUTO = ["loop.batch_size=8", "loop.micro_batch_size=auto", "loop.total_steps=3", "loop.ema_decay=0.9"]


def test_a_run_that_runs_out_equals_one_of_the_size_found(tmp_path, monkeypatch):
    for target in troubled.PATCHED:
        monkeypatch.setattr(*target, getattr(*target))
    base = [*TINY, f"data.root={make_images(tmp_path / 'images')}", *AUTO, "model.drop_path_rate=0.2"]
    troubled.start("little_memory", 3)
    run("finetune", [*base, "run_dir=auto"], tmp_path)
    run("finetune", [*base, "run_dir=two", "loop.micro_batch_size=2"], tmp_path)
    assert_equal_runs(tmp_path / "auto", tmp_path / "two", 3)
    assert (tmp_path / "auto/log.txt").read_text().count("out of memory") == 2

    troubled.start("little_memory", 0)
    with refuses(r"^loop.micro_batch_size: .*in training, with 1 samples of 3x\d+x\d+ at once"):
        run("finetune", [*base, "run_dir=none"], tmp_path)


@pytest.mark.parametrize("dropped", [(Learner, "drop_recordings"), (TrainStream, "drop_copy")])
def test_an_evaluation_that_runs_out_drops_recorded_updates_and_the_copy_or_is_named(dropped, tmp_path, monkeypatch):
    def fill(task, *arguments):
        if recorded:
            return evaluate(task, *arguments)
        raise torch.OutOfMemoryError

    recorded = []
    evaluate = ClassificationTask.evaluate
    monkeypatch.setattr(ClassificationTask, "evaluate", fill)
    base = [*TINY, f"data.root={make_images(tmp_path / 'images')}", *AUTO, "run_dir=run"]
    with refuses("^loop.micro_batch_size: .*in step 1: evaluating"):
        run("finetune", base, tmp_path)
    monkeypatch.setattr(*dropped, lambda owner: recorded.append(owner) or True)
    run("finetune", [*base, "run_dir=other"], tmp_path)
    assert len(recorded) == 1 and (tmp_path / "other/result.json").exists()


def test_a_rank_that_runs_out_ends_the_run(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "run", *AUTO, "loop.batch_size=24")
    trouble = {"TROUBLE": "little_memory 9 9"}
    said = run_process("tests/tasks/troubled.py", overrides, tmp_path, ranks=2, expect=2, variables=trouble)
    assert "loop.micro_batch_size: the device is out of memory in training, with 12 samples" in said
