"""The learner alone, without a run folder: it learns, its state round-trips, rules freeze what they name."""

import pytest
import torch

from engine.learner import Learner
from engine.plan import Plan
from engine.runtime import choose_runtime
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from tests.in_process import SHORT, SMALL_MODEL, configure
from utils.errors import UserError
from utils.rng import generator_for

BATCH, SIZE, CLASSES = 8, 16, 4


OURS = (*SMALL_MODEL, "model.head_init_scale=1.0")


def make_learner(*overrides, model=OURS):
    config, _ = configure("finetune", [*model, *SHORT, *overrides])
    facts = {"class_names": [f"c{number}" for number in range(CLASSES)]}
    torch.manual_seed(0)
    task = KINDS["classification"].build(Setup(config.model, config.task, config.augment.preprocessing(3), facts))
    plan = Plan(1, BATCH, BATCH, 1, 10 * BATCH, 100, 0, 5e-3)
    return Learner(task, config, plan, choose_runtime(config.runtime))


def make_batch(seed=0):
    generator = generator_for(seed)
    return {
        "sample_id": torch.arange(BATCH),
        "key": torch.arange(BATCH),
        "weight": torch.ones(BATCH),
        "images": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(BATCH) % CLASSES,
    }


def tensors_of(learner):
    groups, _ = learner.state()
    return {f"{group}/{name}": tensor.clone() for group, named in groups.items() for name, tensor in named.items()}


def test_it_learns_a_batch_by_heart_and_makes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learner, batch = make_learner("task.label_smoothing=0.0"), make_batch()
    losses = [learner.update([batch]).losses[0].mean().item() for _ in range(60)]
    assert learner.step == 60 and losses[0] > 1.2 and losses[-1] < 0.3
    assert not list(tmp_path.iterdir())


def test_a_loaded_state_continues_bit_for_bit():
    first, batch = make_learner("loop.ema_decay=0.9"), make_batch()
    for _ in range(3):
        first.update([batch])
    tensors, others = first.state()
    saved = {name: {key: tensor.clone() for key, tensor in group.items()} for name, group in tensors.items()}
    second = make_learner("loop.ema_decay=0.9")
    second.update([make_batch(1)])  # another state, to be replaced
    second.check_state(saved, others, "here")
    second.load_state(saved, others, "here")
    second.step = first.step
    for learner in (first, second):
        learner.update([batch])
    left, right = tensors_of(first), tensors_of(second)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_state_of_another_network_is_refused():
    learner, other = make_learner(), make_learner("model.dims=[8,24]")
    tensors, others = other.state()
    with pytest.raises(UserError, match=r"^resume: here is of another model: \d+ tensors of weights differ, first"):
        learner.check_state(tensors, others, "here")


def test_a_rule_freezes_parameters_for_the_first_updates():
    rule = "optim.rules=[{match: 'network.downsample_layers.0.*', freeze_steps: 2}]"
    learner, batch = make_learner(rule), make_batch()
    stem, head = learner.task.network.downsample_layers[0][0].weight, learner.task.network.head.weight
    seen = []
    for _ in range(3):
        before = stem.clone(), head.clone()
        learner.update([batch])
        seen.append((torch.equal(stem, before[0]), torch.equal(head, before[1])))
    assert seen == [(True, False), (True, False), (False, False)]
