"""Updates and meters. Exactness (accumulation, weights), bit equality of skipped steps, reference equality."""

import copy
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from bench.measure import build_bench_run, read_values
from engine.run.recorder import _Meter
from engine.run.skips import EMPTY_STEPS, SkipWatch
from engine.task import StepOutput, Task, log_mean, networks_of
from engine.update.learner import Learner
from engine.update.runtime import Runtime
from engine.update.step import StepResult, first_scale, next_scale
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.groups import build_groups, set_group_values
from optim.schedules import GroupValues
from tests.support import refuses
from utils.ranks import distributed

CPU = torch.device("cpu")
OPTIMISERS = ["adamw", "adan", "sgd", "timm nadamw"]


RUNTIME = Runtime(device=CPU, precision="fp32", channels_last=False, workers=0, prefetch_batches=2)
FP16 = replace(RUNTIME, precision="fp16")


class Poisoned(torch.autograd.Function):
    """0 forward; backward a gradient that is not finite, where `poison` is not."""

    @staticmethod
    def forward(ctx, weight, poison):
        ctx.save_for_backward(weight, poison)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        weight, poison = ctx.saved_tensors
        return torch.where(poison.isfinite(), torch.zeros_like(weight), poison), None


class Regression(Task):
    """Squared error of a small network; a batch may poison its losses or its gradient."""

    def __init__(self, *, norm=False, dropout=0.0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(6)] if norm else []
        layers = [nn.Linear(4, 6), *middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(6, 1)]
        self.network = nn.Sequential(*layers).to(dtype)

    def forward(self, batch, progress):
        error = self.network(batch["x"]).squeeze(1) - batch["y"]
        loss = error.square()
        if "poison_loss" in batch:
            loss = loss + batch["poison_loss"]
        if "poison_gradient" in batch:
            loss = loss + Poisoned.apply(self.network[0].weight, batch["poison_gradient"][0])
        return StepOutput(loss, {"error": log_mean(error.abs(), batch["weight"])})


def make_batch(size=8, seed=0, weight=None, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample_id": torch.arange(size),
        "key": torch.arange(size),
        "weight": torch.ones(size) if weight is None else torch.tensor(weight),
        "x": torch.randn(size, 4, generator=generator, dtype=dtype),
        "y": torch.randn(size, generator=generator, dtype=dtype),
        **more,
    }


def split(batch, micro):
    size = len(batch["weight"])
    return [{name: tensor[start : start + micro] for name, tensor in batch.items()} for start in range(0, size, micro)]


def make_optimizer(name, task, lr=0.05, weight_decay=0.1, **changes):
    group, _, opt = name.partition(" ")
    values = read_values("optim", group) | ({"opt": opt} if opt else {}) | changes
    config = TypeAdapter(OptimConfig).validate_python(values)
    optimizer = build_optimizer(config, build_groups(task, networks_of(task, task.trained), config), lr)
    optimizer.values = GroupValues(lr, weight_decay, None)
    set_group_values(optimizer, optimizer.values)
    return optimizer


RUN = build_bench_run(Regression(), batch_size=8, runtime={"device": "cpu", "precision": "fp32"})


def make_step(task, batches, optimizer, *, step=0, clip=None, scale=None, seed=0, runtime=RUNTIME):
    learner = Learner(task, RUN.config, RUN.plan, runtime)
    learner.optimizer, learner.step, learner.seed, learner.clip_grad_norm = optimizer, step, seed, clip
    learner.schedule = SimpleNamespace(at=lambda step: optimizer.values, progress_at=lambda step: 0.0)
    learner.scale = scale or learner.scale
    result = learner.update(batches)
    if scale is not None:
        scale.update(learner.scale)
    return result


def update_of(task, batches, **settings):
    """(what the step subtracted from each parameter, its result) of one step of plain descent."""
    before = copy.deepcopy(task.state_dict())
    descent = make_optimizer("sgd", task, lr=1.0, weight_decay=0.0, momentum=0.0)  # its update is the gradient itself
    result = make_step(task, batches, descent, **settings)
    return {name: before[name] - parameter.detach() for name, parameter in task.named_parameters()}, result


def length_of(update):
    return torch.stack([each.norm() for each in update.values()]).norm()


def expected_gradient(batch):
    """Gradient, in float64, of the weighted mean loss over a whole batch."""
    task = Regression(dtype=torch.float64)
    error = task.network(batch["x"].double()).squeeze(1) - batch["y"].double()
    weight = batch["weight"].double()
    loss = (error.square() * weight).sum() / weight.sum()
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in task.named_parameters()}
    return gradient, loss.detach(), (error.abs() * weight).sum().detach(), weight.sum()


def bits(task, optimizer=None):
    """Parameters, buffers and optimiser state, as bytes."""
    tensors = dict(task.state_dict())
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# --- the weighted mean

WEIGHTS = [0.5, 2.0, 0.25, 3.0, 0.1, 1.0, 7.0, 0.0]


@pytest.mark.parametrize("weight", [WEIGHTS, [0.0] * 4 + [1.0, 1.0, 0.0, 1.0]])
@pytest.mark.parametrize("micro", [8, 2])
def test_a_step_is_the_weighted_mean_for_any_micro_batch(weight, micro):
    """Also where micro-batches weigh nothing, all weigh little, and the loss of a sample of weight 0 is NaN."""
    batch = make_batch(weight=weight)
    gradient, loss, error, count = expected_gradient(batch)
    batch["poison_loss"] = torch.where(batch["weight"] > 0, 0.0, float("nan"))
    update, result = update_of(Regression(), split(batch, micro))
    torch.testing.assert_close(update, gradient, rtol=1e-5, atol=3e-7, check_dtype=False)
    torch.testing.assert_close(result.sums["grad_norm"][0], length_of(gradient), rtol=1e-5, atol=1e-7)
    assert result.applied == 1
    total, denominator = result.sums["loss"]
    assert total.dtype == denominator.dtype == torch.float64
    torch.testing.assert_close(total / denominator, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.sums["error"][0], error, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.sums["error"][1], count, rtol=1e-6, atol=0)


# --- steps that are not finite

POISONS = {
    "a loss is NaN": {"poison_loss": torch.tensor([0.0, float("nan"), 0, 0, 0, 0, 0, 0])},
    "a gradient is NaN": {"poison_gradient": torch.full((8,), float("nan"))},
    "a gradient is infinite": {"poison_gradient": torch.full((8,), float("-inf"))},
    "an input is NaN": {"x": torch.full((8, 4), float("nan"))},  # and so the batch statistics
    "nothing could be read": {"weight": [0.0] * 8},
}


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("name, kind", [*zip(OPTIMISERS, POISONS), ("adamw", "nothing could be read")])
def test_a_step_that_is_not_finite_leaves_every_tensor_bit_for_bit(name, kind, steps_before):
    task = Regression(norm=True)
    optimizer = make_optimizer(name, task)
    for step in range(steps_before):
        assert make_step(task, split(make_batch(seed=step), 4), optimizer, step=step, clip=1.0).applied == 1
    before, groups = bits(task, optimizer), copy.deepcopy([group | {"params": 0} for group in optimizer.param_groups])
    result = make_step(task, split(make_batch(seed=50, **POISONS[kind]), 4), optimizer, step=steps_before, clip=1.0)
    after = bits(task, optimizer)
    sums = result.sums
    assert result.applied == 0 and sums.pop("skipped_steps").tolist() == [1, 1]
    assert not torch.stack(list(sums.values())).any()
    assert {key: after[key] for key in before} == before
    # A state that the first step makes is that of no step at all.
    assert all(not any(value) for key, value in after.items() if key not in before)
    assert steps_before == 0 or after.keys() == before.keys()
    assert [group | {"params": 0} for group in optimizer.param_groups] == groups
    assert all(parameter.grad is None for parameter in task.parameters())


# --- clipping


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_equals_torchs(limit):
    batch = make_batch(weight=WEIGHTS)
    reference = Regression()
    error = reference.network(batch["x"]).squeeze(1) - batch["y"]
    ((error.square() * batch["weight"]).sum() / batch["weight"].sum()).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    update, result = update_of(Regression(), split(batch, 2), clip=limit)
    torch.testing.assert_close(result.sums["grad_norm"][0], norm.double(), rtol=1e-5, atol=0)  # before clipping
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(update[name], parameter.grad, rtol=1e-4, atol=2e-7)
    assert length_of(update) <= min(limit, float(norm)) * (1 + 1e-4)


# --- what else a step does


def test_draws_of_the_forward_pass_depend_on_seed_step_micro_step_and_rank_alone(monkeypatch):
    def update(batches=None, **settings):
        torch.rand(int(torch.randint(1, 50, ())))  # stray draws
        return update_of(Regression(dropout=0.5), batches or [make_batch()], **settings)[0]["network.3.weight"]

    first = update(step=3, seed=1)
    assert torch.equal(update(step=3, seed=1), first)
    assert not torch.equal(update(step=4, seed=1), first)
    assert not torch.equal(update(step=3, seed=2), first)
    twice = update([make_batch(), make_batch()], step=3, seed=1)  # the same samples under two masks
    assert not torch.allclose(twice, first)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert not torch.allclose(update(step=3, seed=1), first)


# --- the loss scale of fp16


class InFloat32(Regression):
    """Computes in float32 under any autocast, so that a scale of a power of 2 leaves no trace."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, batch, progress):
        with torch.autocast("cpu", enabled=False):
            output = super().forward(batch, progress)
        return StepOutput(output.loss * self.factor, output.logs)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_loss_scale_leaves_no_trace(clip):
    plain, plain_result = update_of(InFloat32(), split(make_batch(), 4), clip=clip)
    scaled, result = update_of(InFloat32(), split(make_batch(), 4), clip=clip, runtime=FP16)
    assert torch.equal(result.sums["grad_norm"], plain_result.sums["grad_norm"])
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-6, atol=1e-7)


def test_a_scale_that_overflows_is_halved_until_it_fits():
    task = InFloat32(factor=1e15)  # times 65536, squared for the norm: beyond 3.4e38
    optimizer, scale = make_optimizer("adamw", task), first_scale(FP16)
    applied, scales = [], []
    for step in range(8):
        applied.append(int(make_step(task, [make_batch()], optimizer, step=step, scale=scale, runtime=FP16).applied))
        scales.append(float(scale["scale"]))
    skipped = applied.count(0)
    assert 1 <= skipped < 8 and applied == [0] * skipped + [1] * (8 - skipped)
    assert scales == [65536.0 / 2 ** min(step + 1, skipped) for step in range(8)]


def test_the_scale_doubles_after_enough_finite_steps(monkeypatch):
    monkeypatch.setattr("engine.update.step.GROWTH_STEPS", 3)
    scale = first_scale(FP16)
    applied = [1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1]
    expected = [1, 1, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 1, 1]  # a step skipped begins the count anew
    found = []
    scale = next_scale(scale, torch.zeros(()), torch.zeros(()))  # of a step that weighs nothing, it learns nothing
    for each in applied:
        scale = next_scale(scale, torch.tensor(float(each)), torch.ones(()))
        found.append(float(scale["scale"]) / 65536)
    assert found == expected


# --- meters


def result(loss, count, applied=1.0, norm=2.0, **logs):
    pairs = [(loss, count), *logs.values(), (norm * applied, applied), (1 - applied, 1.0)]
    figures = torch.tensor(pairs, dtype=torch.float64)
    names = ("loss", *logs, "grad_norm", "skipped_steps")
    return StepResult(names, figures, torch.tensor(applied), torch.tensor(count), [torch.zeros(2)])


def test_means_weigh_steps_by_their_counts_and_skipped_ones_count_as_skipped_alone():
    meter = _Meter(CPU)
    meter.add(result(8.0, 4.0, accuracy=(3.0, 4.0), norm=1.0))
    meter.add(result(0.0, 0.0, accuracy=(0.0, 0.0), applied=0.0))
    meter.add(result(1.0, 1.0, accuracy=(0.0, 1.0), norm=4.0))
    assert meter.means() == {"loss": 9 / 5, "accuracy": 3 / 5, "grad_norm": 2.5, "skipped_steps": 1.0}


# --- steps of which nothing could be read


def watched(results):
    """A watch over steps from 1 on, given as (applied, weight), and how many of them there are."""
    watch = SkipWatch()
    for number, (applied, weight) in enumerate(results, start=1):
        watch.add(number, [make_batch(2)], result(0.0, weight, applied=applied))
    watch.read(len(results))
    return watch, len(results)


GOOD, EMPTY, BAD = (1.0, 8.0), (0.0, 0.0), (0.0, 8.0)


@pytest.mark.parametrize(
    "results, last, ends",
    [
        ([GOOD] * 5 + [EMPTY] * EMPTY_STEPS, False, True),
        ([EMPTY] * 3, False, False),  # a few small steps of unreadable images do not end a run,
        ([EMPTY] * 3, True, True),  # unless it was all of them
        ([GOOD] * 5 + [EMPTY] * 5 + [BAD] + [EMPTY] * 5, False, False),
    ],
)
def test_a_run_of_which_nothing_can_be_read_ends(results, last, ends):
    watch, step = watched(results)
    if not ends:
        watch.check(step, last=last)
        return
    with refuses(rf"^data\.root: no image of steps {max(1, step - EMPTY_STEPS + 1)} to {step} could be read"):
        watch.check(step, last=last)


def test_skipped_steps_count_for_a_hundred_steps(monkeypatch):
    monkeypatch.setattr("engine.run.skips.MOST_SKIPPED", 2)
    watch, step = watched([BAD] * 3 + [GOOD] * 97)
    with refuses(r"^optim\.lr: 3 of the last 100 steps"):
        watch.check(step, last=False)
    for number, left in ((101, [2, 3]), (102, [3]), (103, [])):
        watch.add(number, [make_batch(2)], result(0.0, 8.0))
        watch.read(number)
        watch.check(number, last=False)
        assert watch.steps == [(step, "gradient") for step in left]


def test_a_step_that_is_watched_keeps_no_batch():
    batch = make_batch(2)
    weight = weakref.ref(batch["weight"])  # in a packed batch, a view of all its images
    watch = SkipWatch()
    watch.add(1, [batch], result(1.0, 8.0))
    del batch
    assert weight() is None
