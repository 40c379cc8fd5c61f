"""How a head begins: it recognises what a linear layer can, on standardised features, and whole runs begin with it."""

import shutil
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.run.evaluation import Evaluator
from engine.tasks.classification import ClassificationTask
from engine.tasks.head import fit_head
from engine.tasks.kind import Setup
from tests.engine.test_tasks import CLASSIFY, make_batch, make_classifier
from tests.engine.test_tasks import runtime as runtime  # a fixture
from tests.in_process import TINY, check_resumption, run
from tests.support import assert_equal_runs, logged, make_collection, rows
from utils.ranks.signals import Stopped


def make_batches(classes=4, count=6):
    """Images whose class shows in their brightness."""
    batches = []
    for number in range(count):
        batch = make_batch(size=8, seed=number)
        batch["sample_id"] = batch["sample_id"] + 8 * number
        batch["labels"] = torch.arange(8) % classes
        batch["images"] = (batch["images"] // 8 + (220 // classes * batch["labels"]).view(-1, 1, 1, 1)).to(torch.uint8)
        batches.append(batch)
    return batches


def measure(task, batches):
    with torch.no_grad():
        logits = torch.cat([task.network(task.normalise(batch["images"])) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("norm", [True, False])
def test_the_fitted_head_recognises_and_nothing_else_changes(norm, runtime):
    task, batches = make_classifier(), make_batches()
    if not norm:
        task.network.norm = nn.Identity()
    before = deepcopy(task.network.state_dict())
    loss_before, _ = measure(task, batches)
    fit_head(task, batches, runtime)
    loss, share = measure(task, batches)
    assert share > 0.75 and loss < 0.7 * loss_before and task.network.training
    after = task.network.state_dict()
    changed = {"head.weight", "head.bias"} | ({"norm.weight", "norm.bias"} if norm else set())
    assert {name for name in after if not torch.equal(after[name], before[name])} == changed
    # After many epochs, it becomes the mean of the trained and the fitted one, here of zeros.
    halved = {name: tensor / (1 + name.startswith("head.")) for name, tensor in after.items()}
    zeros = map(torch.zeros_like, task.network.head.parameters())
    task.fit = lambda *given: (*zeros, 0.0, 0.0)
    fit_head(task, batches, runtime, epochs=3)
    torch.testing.assert_close({**task.network.state_dict()}, halved)


def test_a_head_that_would_not_recognise_other_images_starts_cautious(runtime):
    """Labels at random: by heart, a head of as many weights would be right, and sure of it."""
    task, batches = make_classifier(), make_batches(count=2)
    for number, batch in enumerate(batches):
        batch["labels"] = torch.randint(4, (8,), generator=torch.Generator().manual_seed(number))
    fit_head(task, batches, runtime)
    with torch.no_grad():
        logits = task.network(task.normalise(batches[0]["images"]))
    assert F.softmax(logits, dim=1).max() < 0.6


def test_images_of_which_none_can_be_read_are_refused(runtime):
    """That some cannot is ignored: tests/engine/test_probe.py."""
    unreadable = [batch | {"weight": torch.zeros(8)} for batch in make_batches()]
    with pytest.raises(ValueError, match=r"^task\.head: 0 images could be read"):
        fit_head(make_classifier(), unreadable, runtime)


# --- whole runs

WORDS = [*TINY, "data.root=images", "loop.batch_size=8"]


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with images and a run on them in first/."""
    make_collection(folder / "images", per_class=8)
    finetune(folder, "run_dir=first", "loop.total_steps=12", "optim.lr=0.005", "model.head_init_scale=1.0")
    return folder


def finetune(folder, *overrides):
    run("finetune", [*WORDS, *overrides], folder)


def test_a_run_begins_with_it_and_resumes_without_it(place):
    given = ["task.head=fitted", "run_dir=fitted"]
    finetune(place, *given)
    text = (place / "fitted/log.txt").read_text()
    assert "task.head: fitted to 24 images; leave-one-out loss " in text
    finetune(place, *given, "loop.total_steps=4")
    assert "task.head" not in (place / "fitted/log.txt").read_text()[len(text) :]


def test_a_refitted_head_is_measured_first_and_fitted_last_to_the_bit_also_after_a_kill(place, monkeypatch):
    given = ["task.head=refitted", "loop.total_steps=3", "optim.lr=1e-12"]
    check_resumption("finetune", [*WORDS, *given], place, killed_at=2, steps=3)
    finetune(place, *given, "loop.total_steps=8", "run_dir=longer")  # 2.7 epochs
    logs = [(place / name / "log.txt").read_text() for name in ("straight", "longer")]
    assert [text.count("task.head: fitted to 24 images") for text in logs] == [2, 2]
    measured = rows(place / "straight/metrics.jsonl", "evaluate")
    assert measured[0]["step"] == 0
    assert measured[0]["loss"] == pytest.approx(measured[-1]["loss"], rel=1e-3)  # the trained head would have moved

    measure = Evaluator.measure

    def stop(evaluator, **words):
        if evaluator.learner.step == 8:
            raise Stopped
        return measure(evaluator, **words)

    monkeypatch.setattr(Evaluator, "measure", stop)  # the last evaluation, after the fit
    longer = [*given, "loop.total_steps=8", "run_dir=stopped"]
    with pytest.raises(SystemExit):
        finetune(place, *longer)
    monkeypatch.undo()
    finetune(place, *longer)
    assert_equal_runs(place / "longer", place / "stopped", 8)


def test_first_layers_and_batch_norms_below_a_refitted_head_stay():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Linear(256, 2))
    setup = Setup(network, CLASSIFY.changed({"head": "refitted"}), facts={"class_names": "ab"})
    task = ClassificationTask(setup).train()
    assert not task.network[1].training
    assert sum(parameter.requires_grad for parameter in task.parameters()) == 5  # of six


def test_a_kept_head_continues_where_its_run_ended_and_resumes_without_it(place):
    """init_from is read once: that run may be gone when this one resumes."""
    shutil.copytree(place / "first", place / "before")
    given = ["task.head=kept", "optim.lr=1e-12", "run_dir=kept", "init_from=before"]
    finetune(place, *given, "loop.total_steps=1")
    text = (place / "kept/log.txt").read_text()
    assert "left at their initial values: none; unused tensors of the file: none" in text
    losses = [logged(place / name, "evaluate", "loss")[-1] for name in ("kept", "first")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.rmtree(place / "before")
    finetune(place, *given, "loop.total_steps=2")
    assert "resumed from" in (place / "kept/log.txt").read_text()
