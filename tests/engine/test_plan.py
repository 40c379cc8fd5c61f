"""The plan. Properties (splitting a batch, ends of epochs), literal tables (steps, warm-up, rate), refusals."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from bench.measure import read_values
from engine.config import _LoopConfig
from engine.plan import Plan, plan_streams
from optim.config import OptimConfig, ScheduleConfig
from tests.support import refuses


def read(group, name, **changes):
    return read_values(group, name) | changes


def plan(*, epoch_length, world_size=1, reads=0, finder=None, optim=None, warmup=None, **loop):
    """The plan of the default files with some keys of loop, optim and schedule changed."""
    config = SimpleNamespace(
        loop=_LoopConfig.model_validate(read("loop", "default", **loop)),
        optim=TypeAdapter(OptimConfig).validate_python(read("optim", "adamw", **(optim or {}))),
        schedule=TypeAdapter(ScheduleConfig).validate_python(read("schedule", "cosine", **(warmup or {}))),
        lr_finder=SimpleNamespace(**{"enabled": False, "steps": 100, "only": False} | (finder or {})),
    )
    train = SimpleNamespace(epoch_length=epoch_length, chunk=None)
    loaders = {"val": SimpleNamespace(samples=reads)}
    return plan_streams(config, SimpleNamespace(train=train, evaluation=loaders), world_size)


# --- splitting a batch


def split(batch_size, world, cap, chunk):
    return _LoopConfig.model_construct(batch_size=batch_size, micro_batch_size=cap).micro_batches(world, chunk)


def test_the_micro_batch_is_the_largest_divisor_within_the_cap_and_lies_within_a_chunk():
    shares, caps, chunks = (1, 2, 7, 12, 36, 60, 97), (1, 2, 5, 8, 35, 200), (None, 1, 2, 4, 5, 6, 12, 16)
    for world, share, cap, chunk in itertools.product((1, 2, 3, 5, 8), shares, caps, chunks):
        micro, accum = split(share * world, world, cap, chunk)
        assert micro * accum == share and micro <= cap
        within = share if chunk is None else math.gcd(share, chunk)
        assert micro == max(size for size in range(1, cap + 1) if within % size == 0)


def test_a_batch_that_does_not_divide_is_refused():
    with refuses("^loop.batch_size: "):
        split(4096, 24, 64, None)


# --- steps, warm-up, rate

TRAIN = {"epochs": 12.0, "samples": 128_000, "most_epochs": 200.0}
LORA = {"epochs": 10.0, "samples": 2_000, "most_epochs": None}


@pytest.mark.parametrize(
    "loop, length, batch, steps, why",
    [
        ({"total_epochs": 1.0}, 101, 10, 11, "a step that begins in the epoch belongs to it"),
        ({"total_epochs": 0.001}, 10, 10, 1, "at least one step"),
        ({"total_epochs": 1.1}, 50, 1, 55, "1.1 x 50 is 55.00000000000001 as a float"),
        ({"total_epochs": 3.0, "total_steps": 7}, 100, 10, 7, "steps win"),
        ({"auto": TRAIN}, 10_667, 128, math.ceil(12 * 10_667 / 128), "at least 12 epochs"),
        ({"auto": TRAIN}, 10_000, 128, 1_000, "at least 128,000 samples"),
        ({"auto": TRAIN}, 128, 128, 200, "up to 200 epochs"),
        ({"auto": TRAIN}, 5, 128, 100, "at least 100 updates"),
        ({"auto": LORA}, 1, 8, 250, "2,000 samples of any small collection"),
        ({"auto": LORA}, 300, 8, 375, "10 epochs"),
        ({"auto": LORA, "total_epochs": 20.0}, 15, 8, 38, "a number goes before auto"),
    ],
)
def test_epochs_become_steps_once(loop, length, batch, steps, why):
    assert plan(epoch_length=length, batch_size=batch, **loop).total_steps == steps, why


@pytest.mark.parametrize(
    "warmup, expected, why",
    [
        ({"warmup_epochs": 0.2, "warmup_steps": None}, 2, "a fifth of an epoch of ten steps"),
        ({"warmup_epochs": 5.0, "warmup_steps": 0}, 0, "steps win, and 0 is a value"),
        ({"warmup_epochs": 9.0, "warmup_steps": None}, 3, "at most a tenth"),
        ({"warmup_epochs": 0.0, "warmup_steps": 100}, 3, "also in steps"),
        ({"warmup_epochs": 1.0, "warmup_steps": None, "warmup_most": 0.5}, 10, "a recipe may want more"),
    ],
)
def test_warmup_steps(warmup, expected, why):
    """Whichever way the length is stated."""
    for length in ({"total_epochs": 3.0}, {"total_epochs": 1000.0, "total_steps": 30}):
        assert plan(epoch_length=100, batch_size=10, warmup=warmup, **length).warmup_steps == expected, why


@pytest.mark.parametrize("length", [{}, {"total_steps": 100}])
def test_a_small_collection_that_is_read_more_often_keeps_the_share_of_warm_up(length):
    warmup = {"warmup_epochs": 1.0, "warmup_steps": None}
    assert plan(epoch_length=50, warmup=warmup, **length).warmup_steps == 5  # a 20th, as of 20 epochs


def test_the_rate_follows_the_batch():
    """base_lr is stated for 256 samples, as for the official pretraining; a rate of 0 is a value."""
    cases = [(4096, {"base_lr": 1.5e-4}, 2.4e-3), (32, {"base_lr": 0.08}, 0.01), (1024, {"lr": 0.0}, 0.0)]
    for batch, optim, expected in cases:
        assert plan(epoch_length=5000, batch_size=batch, optim=optim).lr == pytest.approx(expected, rel=1e-12)


def test_the_number_of_ranks_changes_neither_length_nor_rate():
    plans = [plan(epoch_length=1000, world_size=world, batch_size=240, micro_batch_size=50) for world in (1, 2, 3, 8)]
    assert len({(each.total_steps, each.warmup_steps, each.lr, each.epoch_length) for each in plans}) == 1
    assert [(each.micro_batch_size, each.accum_steps) for each in plans] == [(48, 5), (40, 3), (40, 2), (30, 1)]


@pytest.mark.parametrize(
    "steps, enabled, lr, test",
    [(999, "auto", None, 0), (1000, "auto", None, 100), (1000, "auto", 0.1, 0), (200, True, None, 100)],
)
def test_a_range_test_that_nobody_asked_for_is_at_most_a_share_of_the_run(steps, enabled, lr, test, log):
    found = plan(epoch_length=10, total_steps=steps, finder={"enabled": enabled}, optim={"lr": lr})
    assert found.range_test_steps == test and ("too short for a test" in log.text) == (steps == 999)


# --- ends of epochs


def walk(plan, every=1.0, start=0):
    """Run the loop without its body: (epochs that ended with their steps, steps at which an evaluation is due)."""
    step, ends, due = start, [], []
    while step < plan.total_steps:
        epoch = plan.epoch_of(step)
        end = plan.epoch_end(epoch)
        assert end > step, f"epoch {epoch} would end at {end} without an update from step {step}"
        while step < end:
            step += 1
            if plan.is_due(step, every):
                due.append(step)
        ends.append((epoch, step))
    return ends, due


def first_at_multiples(plan, steps, samples):
    """The steps that are the first at or beyond a multiple of so many samples, and the last one."""
    batch = plan.batch_size
    pairs = zip([0, *steps], steps)
    return [
        now for before, now in pairs if now == plan.total_steps or now * batch // samples > before * batch // samples
    ]


def awkward():
    for length in (1, 7, 10, 54, 97, 1000):
        for batch in (1, 2, 3, 7, 10, 53, 96, 97):
            for total in (1, 2, 9, 50, 51):
                yield Plan(1, batch, batch, 1, length, total, warmup_steps=0, lr=1.0)


def test_each_epochs_end_is_reached_exactly_once_and_the_next_one_starts_there():
    for plan in awkward():
        ends, _ = walk(plan)
        assert ends[-1][1] == plan.total_steps
        if plan.batch_size > plan.epoch_length:  # each update ends one epoch
            assert [step for _, step in ends] == list(range(1, plan.total_steps + 1))
            continue
        assert [epoch for epoch, _ in ends] == list(range(len(ends)))
        for epoch, step in ends[:-1]:
            read, wanted = step * plan.batch_size, (epoch + 1) * plan.epoch_length
            assert read >= wanted > read - plan.batch_size  # the first step at or beyond the boundary


@pytest.mark.parametrize("every, among", [("0.3", "0.1"), ("1.5", "0.5"), ("1", "2")])
def test_evaluations_and_what_is_due_among_them_are_the_first_at_or_beyond_each_multiple(every, among):
    for plan in awkward():
        steps = range(1, plan.total_steps + 1)
        evaluations = walk(plan, float(among))[1]
        assert evaluations == first_at_multiples(plan, steps, Fraction(among) * plan.epoch_length), plan
        expected = first_at_multiples(plan, evaluations, Fraction(every) * plan.epoch_length)
        pairs = zip([0, *evaluations], evaluations)
        assert [step for since, step in pairs if plan.is_due(step, float(every), since)] == expected, plan


@pytest.mark.parametrize(
    "training, validation, loop, epochs",
    [
        (1_281_167, 50_000, {"total_epochs": 100}, 1.0),  # a twenty-fifth of an epoch
        (289, 1_958, {"total_epochs": 1000}, 1000 / 20),  # an epoch of one update: 20 times
        (15, 0, {"total_steps": 250, "batch_size": 8}, 25 * 8 / 15),  # only pictures: 25 updates apart
        (15, 0, {"total_steps": 3000, "batch_size": 8}, 150 * 8 / 15),
        (15, 0, {"total_steps": 35, "batch_size": 8}, 7 * 8 / 15),  # five times
        (10_000, 10_000, {"total_epochs": 20}, 4.0),  # five times a run
        (2_890, 19_580, {"total_epochs": 20}, 19_580 / 2_890),  # no more than was trained since the one before
        (47_495, 7_158, {"total_steps": 3, "batch_size": 16}, 7_158 / 47_495),  # only the last
        (1_000, 400, {"total_epochs": 40, "evaluate_every_epochs": 0.5}, 0.5),
    ],
)
def test_evaluations_read_a_fifth_of_what_training_reads_or_come_five_times(training, validation, loop, epochs):
    made = plan(epoch_length=training, reads=validation, **loop)
    assert made.evaluate_every_epochs == pytest.approx(epochs, rel=0.01)
    due = [step for step in range(1, made.total_steps + 1) if made.is_due(step, made.evaluate_every_epochs)]
    assert len(due) <= 20 or epochs == 1.0 or "evaluate_every_epochs" in loop
    images = [made.batch_size * (step - before) for before, step in zip([0, *due], due[:-1])]
    assert all(count > validation - made.batch_size for count in images) or "evaluate_every_epochs" in loop
