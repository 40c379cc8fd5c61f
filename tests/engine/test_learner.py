"""The learner alone, without a run folder: it learns, its state round-trips, rules freeze what they name."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.learner import Learner
from engine.plan import Plan
from engine.run import Run
from engine.runtime import choose_runtime
from engine.step import LossScale
from engine.task import Report, StepOutput, Task, checkpointed_state, networks_of
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from tests.in_process import SHORT, SMALL_MODEL, configure
from utils.config.messages import ConfigError
from utils.errors import UserError
from utils.io.weights import write_tensors
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


def in_fp16(learner):
    """Give a learner the autocast and the loss scale of fp16, which choose_runtime refuses on a CPU."""
    learner.runtime = replace(learner.runtime, precision="fp16")
    learner.scale = LossScale(learner.runtime)
    return learner


def tensors_of(learner):
    groups, _ = learner.state()
    return {f"{group}/{name}": tensor.clone() for group, named in groups.items() for name, tensor in named.items()}


def assert_continues(first, second, saved, others, batch):
    """Load a saved state of one learner into another; an update of both makes the same tensors, bit for bit."""
    second.load_state(saved, others, "here")
    second.step = first.step
    for learner in (first, second):
        learner.update([batch])
    left, right = tensors_of(first), tensors_of(second)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_loaded_state_continues_bit_for_bit():
    first, batch = in_fp16(make_learner("loop.ema_decay=0.9")), make_batch()
    for _ in range(3):
        first.update([batch])
    tensors, others = first.state()
    saved = {name: {key: tensor.clone() for key, tensor in group.items()} for name, group in tensors.items()}
    second = in_fp16(make_learner("loop.ema_decay=0.9"))
    second.update([make_batch(1)])  # another state, to be replaced
    assert_continues(first, second, saved, others, batch)
    assert second.scale.good_steps == 4


def test_bf16_weights_learn_and_continue_bit_for_bit():
    setting = ("optim.bf16_weights=true", "runtime.precision=bf16", "optim.lr=1e-4")
    first, second, batch = make_learner(*setting), make_learner(*setting), make_batch()
    losses = [first.update([batch]).losses[0].mean().item() for _ in range(60)]
    tensors, others = first.state()
    assert losses[-1] < losses[0] - 0.1
    kept = {tensor.dtype for group in ("weights", "optimizer") for tensor in tensors[group].values() if tensor.ndim}
    assert kept == {torch.bfloat16}
    saved = {name: {key: tensor.clone() for key, tensor in group.items()} for name, group in tensors.items()}
    assert_continues(first, second, saved, others, batch)


def test_averages_of_8_bits_are_saved_as_such_and_continue_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    setting = ("optim=adamw8bit", "model.dims=[64,128]", "loop.ema_decay=0.9")
    first, second, batch = make_learner(*setting), make_learner(*setting), make_batch()
    losses = [first.update([batch]).losses[0].mean().item() for _ in range(20)]
    tensors, others = first.state()
    assert losses[-1] < losses[0] - 0.1
    assert {tensor.dtype for tensor in tensors["optimizer"].values()} == {torch.uint8, torch.float32}
    saved = {name: {key: tensor.clone() for key, tensor in group.items()} for name, group in tensors.items()}
    write_tensors(tmp_path / "optimizer", tensors["optimizer"])
    saved["optimizer"] = load_file(tmp_path / "optimizer")
    assert_continues(first, second, saved, others, batch)


@pytest.mark.parametrize("more", ["runtime.precision=fp32", "loop.ema_decay=0.9"])
def test_bf16_weights_need_autocast_and_have_no_average(more):
    with pytest.raises((UserError, ConfigError), match=r"optim\.bf16_weights: true"):
        make_learner("optim.bf16_weights=true", "runtime.precision=bf16", more)


def test_the_average_is_that_of_the_weights_after_each_update():
    learner, batch = make_learner("loop.ema_decay=0.9", "loop.ema_warmup=true"), make_batch()

    def weights():
        return {name: tensor.double() for name, tensor in learner.state()[0]["weights"].items()}

    average = weights()
    for decay in (1 / 10, 2 / 11, 3 / 12, 4 / 13):
        learner.update([batch])
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in weights().items()}
    found = learner.state()[0]["average_weights"]
    assert found.keys() == average.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-6, atol=1e-7)


class OnFrozen(Task):
    """A linear layer on a frozen encoder that has statistics and draws."""

    helpers = ("encoder",)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.network = nn.Linear(4, 1)

    def forward(self, batch, progress):
        features = self.encoder(batch["images"].float()).mean(dim=(2, 3))
        return StepOutput(self.network(features).squeeze(1).square())

    def evaluate(self, loaders, step):
        return Report({"loss": 0.0})


def test_a_frozen_network_stays_in_eval_mode_without_gradients():
    config, _ = configure("finetune", [*OURS, *SHORT])
    plan = Plan(1, BATCH, BATCH, 1, 10 * BATCH, 100, 0, 5e-3)
    learner = Learner(OnFrozen(), config, plan, choose_runtime(config.runtime))
    task, before = learner.task, copy.deepcopy(learner.task.encoder.state_dict())
    task.train()
    learner.update([make_batch()])
    Run.measure(SimpleNamespace(learner=learner, _due_loaders=dict))
    assert task.network.training and not any(module.training for module in task.encoder.modules())
    learner.update([make_batch()])
    after = task.encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in task.encoder.parameters())


def test_half_of_a_network_is_frozen_by_its_dotted_name():
    task = OnFrozen()
    task.network = nn.ModuleDict({"encoder": nn.Linear(3, 4), "decoder": nn.Linear(4, 1)})
    task.encoder, task.trained, task.helpers = None, ("network.decoder",), ("network.encoder", "encoder")
    task.train()
    assert [name for name, one in task.named_parameters() if one.requires_grad] == [
        "network.decoder.weight", "network.decoder.bias"
    ]  # fmt: skip
    assert task.network["decoder"].training and not task.network["encoder"].training
    assert set(checkpointed_state(task)) == {"network.decoder.weight", "network.decoder.bias"}
    for name in ("network.encodr", "none.encoder", "netwrk"):
        with pytest.raises(AttributeError):
            networks_of(task, [name])


def test_the_state_of_another_network_is_refused():
    learner, other = make_learner(), make_learner("model.dims=[8,24]")
    tensors, others = other.state()
    with pytest.raises(UserError, match=r"^resume: here is of another model: \d+ tensors of weights differ, first"):
        learner.load_state(tensors, others, "here")


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
