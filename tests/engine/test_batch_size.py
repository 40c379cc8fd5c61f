"""loop.batch_size=auto: the search, that it leaves no trace, what the run folder keeps, ranks, refusals; and the memory
by part.
"""

import json

import pytest

from engine.batch_size import search
from engine.memory import memory_by_part
from engine.run import start_ranks
from tests.engine.test_exactness import assert_same_tensors
from tests.engine.test_learner import make_batch, make_learner
from tests.in_process import TINY, configure, make_images, run
from tests.support import ROOT, checkpoint_tensors, command, common, rows
from tests.tasks import troubled
from utils.errors import UserError

SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


@pytest.mark.parametrize(
    ("limits", "found", "trials"),
    [
        ([100], 24, 5),  # 4, then all that are larger
        ([12], 12, 5),
        ([3], 3, 2),  # nothing larger is tried after one that was too large
        ([9, 100, 7, 8], 6, 8),  # the others are tried with what the first found, and lower it
        ([2, 2], 2, 4),
    ],
)
def test_the_largest_size_that_every_shape_takes(limits, found, trials):
    tried = []

    def fits(shape, size):
        tried.append((shape, size))
        return size <= limits[shape]

    assert search(SIZES, len(limits), fits) == found and len(tried) == trials


def test_a_device_that_takes_not_one_sample_is_refused():
    with pytest.raises(UserError, match=r"^loop.batch_size: auto, .* runtime.grad_checkpointing=true"):
        search(SIZES, 2, lambda shape, size: False)


@pytest.fixture
def little_memory(monkeypatch):
    """Return a function that lets this process's device take so many samples at once."""
    for target in troubled.PATCHED:
        monkeypatch.setattr(*target, getattr(*target))
    return lambda size: troubled.start("little_memory", size)


AUTO = ["loop.global_batch_size=8", "loop.batch_size=auto", "loop.total_steps=3", "loop.ema_decay=0.9"]


def test_the_run_equals_one_of_the_size_found_and_keeps_it(tmp_path, little_memory, monkeypatch):
    base = [*TINY, f"data.root={make_images(tmp_path / 'images')}", *AUTO, "model.drop_path_rate=0.2"]
    little_memory(3)
    run("finetune", [*base, "run_dir=auto"], tmp_path)
    run("finetune", [*base, "run_dir=two", "loop.batch_size=2"], tmp_path)
    assert_same_tensors(checkpoint_tensors(tmp_path / "auto", 3), checkpoint_tensors(tmp_path / "two", 3))
    assert rows(tmp_path / "auto/metrics.jsonl") == rows(tmp_path / "two/metrics.jsonl")
    file = tmp_path / "auto/batch_size.json"
    assert json.loads(file.read_text()) == {"batch_size": 2, "device": "cpu"}
    said = (tmp_path / "auto/log.txt").read_text()
    assert "loop.batch_size: auto is 2 on cpu; 4 micro-batches" in said and "memory at the first step: weights" in said

    monkeypatch.setattr("engine.batch_size.search", None)  # a resumed run does not search
    run("finetune", [*base, "run_dir=auto", "loop.total_steps=4"], tmp_path)
    for content, why in (
        ('{"batch_size": 2, "device": "A100"}', "found 2 on A100, and this is cpu"),
        ("{}", "damaged"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=f"^loop.batch_size: .*{why}.*remove .* to search again"):
            run("finetune", [*base, "run_dir=auto", "loop.total_steps=5"], tmp_path)
    run("finetune", [*base, "run_dir=auto", "loop.total_steps=5", "loop.batch_size=1"], tmp_path)


@pytest.mark.ddp
def test_ranks_agree_on_the_smallest(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "run", *AUTO, "loop.global_batch_size=24")
    done = command(
        "torchrun", "--standalone", "--nproc_per_node=2", ROOT / "tests/tasks/troubled.py", *overrides,
        OMP_NUM_THREADS="1", TROUBLE="little_memory 9 3",
    )  # fmt: skip
    assert "loop.batch_size: auto is 3 on cpu; 4 micro-batches" in done.stderr, done.stderr[-4000:]
    assert json.loads((tmp_path / "run/batch_size.json").read_text())["batch_size"] == 3


@pytest.mark.parametrize("more", [[], ["dry_run=true"]])
def test_a_cpu_has_no_memory_to_search(more):
    config, _ = configure("finetune", [*TINY, "data.root=images", *AUTO, *more])
    with pytest.raises(UserError, match="^loop.batch_size: auto searches the memory of a GPU"):
        start_ranks(config)


def test_memory_by_part():
    learner = make_learner("optim=adamw", "loop.ema_decay=0.9")
    learner.update([make_batch()])
    weights = sum(parameter.nbytes for parameter in learner.task.parameters())
    steps = 4 * len(list(learner.task.parameters()))
    found = {name: gib * 2**30 for name, gib in memory_by_part(learner).items()}
    buffers = sum(buffer.nbytes for buffer in learner.task.buffers())
    assert found == {
        "weights": weights + buffers, "gradients": weights, "optimiser state": 2 * weights + steps, "averages": weights,
    }  # fmt: skip
    learner.task.roles = learner.task.roles.__class__(frozen=("network",))
    assert memory_by_part(learner)["frozen networks"] * 2**30 == weights
