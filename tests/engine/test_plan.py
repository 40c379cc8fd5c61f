"""The plan. Properties (splitting a batch, ends of epochs), literal tables (steps, warm-up, rate), refusals."""

import logging
import math
from fractions import Fraction

import pytest
import yaml
from pydantic import TypeAdapter

from engine.config import LoopConfig
from engine.plan import Plan, make_plan, split_batch
from optim.config import OptimConfig, ScheduleConfig
from utils.config.entry_point import CONF
from utils.errors import UserError


def read(group, name, **changes):
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) | changes


def plan(*, epoch_length, world_size=1, schedule="cosine", chunk=None, optim=None, warmup=None, **loop):
    """The plan of the default files with some keys of loop, optim and schedule changed."""
    return make_plan(
        LoopConfig.model_validate(read("loop", "default", **loop)),
        TypeAdapter(OptimConfig).validate_python(read("optim", "adamw", **(optim or {}))),
        TypeAdapter(ScheduleConfig).validate_python(read("schedule", schedule, **(warmup or {}))),
        world_size=world_size,
        epoch_length=epoch_length,
        chunk=chunk,
    )


@pytest.fixture
def said():
    """(level, message) of the plan's own logger, whatever other tests did to logging."""

    class Kept(logging.Handler):
        def emit(self, record):
            kept.append((record.levelname, record.getMessage()))

    kept, handler, logger = [], Kept(), logging.getLogger("atelier.engine.plan")
    before = logger.level, logger.disabled
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.disabled = False
    yield kept
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.disabled = before[1]


# --- splitting a batch

SPLITS = [
    (256, 1, 128, None, (128, 2), "the default"),
    (256, 1, 256, None, (256, 1), "no accumulation where the device takes all"),
    (256, 1, 1000, None, (256, 1), "a cap above the share is the share"),
    (256, 8, 128, None, (32, 1), "eight ranks"),
    (96, 1, 40, None, (32, 3), "40 does not divide 96: 32 does"),
    (30, 2, 8, None, (5, 3), "15 a rank: 5, not 8"),
    (7, 1, 6, None, (1, 7), "a prime above the cap"),
    (4096, 24, 64, None, None, "4096 / 24 is no whole number"),
    (64, 1, 32, 16, (16, 4), "a micro-batch within a chunk of one shape"),
    (64, 4, 32, 16, (16, 1), "a chunk a rank"),
    (64, 8, 32, 16, (8, 1), "two ranks share a chunk"),
    (48, 1, 10, 12, (6, 8), "the largest divisor of a chunk of 12 within 10"),
    (24, 2, 24, 8, (4, 3), "a rank's 12 samples begin amid a chunk of 8: quarters of 4 never span two"),
]


@pytest.mark.parametrize("global_size, world, cap, chunk, expected, why", SPLITS)
def test_a_batch_is_split(global_size, world, cap, chunk, expected, why):
    if expected is None:
        with pytest.raises(UserError):
            split_batch(global_size, world, cap, chunk)
    else:
        assert split_batch(global_size, world, cap, chunk) == expected, why


def test_the_micro_batch_is_the_largest_divisor_within_the_cap():
    for world in (1, 2, 3, 5, 8):
        for share in (1, 2, 7, 12, 36, 60, 97):
            for cap in (1, 2, 5, 8, 35, 200):
                micro, accum = split_batch(share * world, world, cap, None)
                assert micro * accum * world == share * world
                assert micro <= cap
                assert not any(share % larger == 0 for larger in range(micro + 1, min(share, cap) + 1))


def test_a_micro_batch_lies_within_a_chunk_on_every_rank():
    for world in (1, 2, 3, 4, 6):
        for chunk in (1, 2, 4, 6, 12):
            for cap in (1, 4, 5, 100):
                share = 24 // world
                micro, accum = split_batch(24, world, cap, chunk)
                assert micro * accum == share and micro <= cap
                for start in range(0, 24, micro):
                    assert start // chunk == (start + micro - 1) // chunk


@pytest.mark.parametrize(
    "global_size, world, advice",
    [
        (4096, 24, "4096 does not divide by the 24 ranks; set it to 4080, 4104, or start another number"),
        (7, 2, "set it to 6, 8,"),
        (3, 8, "set it to 8,"),  # nothing below but 0
    ],
)
def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(global_size, world, advice):
    with pytest.raises(UserError) as caught:
        split_batch(global_size, world, 64, None)
    assert str(caught.value).startswith(f"loop.global_batch_size: {global_size} ")
    assert advice in str(caught.value)


def test_a_batch_that_is_no_multiple_of_the_chunk_is_refused():
    with pytest.raises(UserError, match=r"^loop\.global_batch_size: 100 is not a multiple of .* chunk of 16 .* of 16$"):
        split_batch(100, 2, 64, 16)
    with pytest.raises(UserError, match="chunk of 16"):
        plan(epoch_length=320, global_batch_size=100, chunk=16)


# --- steps, warm-up, rate


@pytest.mark.parametrize(
    "epochs, length, batch, steps, why",
    [
        (1.0, 100, 10, 10, "whole"),
        (1.0, 101, 10, 11, "a step that begins in the epoch belongs to it"),
        (2.0, 101, 10, 21, "202 samples: epochs are not rounded up one by one"),
        (0.5, 100, 10, 5, "half an epoch"),
        (2.5, 10, 4, 7, "25 samples"),
        (20.0, 5, 256, 1, "100 samples are one step"),
        (0.001, 10, 10, 1, "at least one step"),
        (1.1, 50, 1, 55, "1.1 x 50 is 55.00000000000001 as a float"),
        (300.0, 1_281_167, 1024, 375_342, "300 epochs of ImageNet: 375,341.9 steps"),
    ],
)
def test_epochs_become_steps_once(epochs, length, batch, steps, why):
    found = plan(epoch_length=length, total_epochs=epochs, global_batch_size=batch)
    assert found.total_steps == steps, why


@pytest.mark.parametrize(
    "length, epochs",
    [
        (12_800, 12, ), (1_280_000, 12), (10_667, 12), (10_000, 13), (1_280, 100), (640, 200), (64, 200),
    ],
)  # fmt: skip
def test_auto_epochs_follow_from_the_size_of_the_collection(length, epochs, said):
    """At least 12, and what 1,000 updates of 128 take, up to 200."""
    found = plan(epoch_length=length, total_epochs="auto", global_batch_size=128)
    assert found.total_steps == math.ceil(epochs * length / 128)
    assert any(text.startswith(f"loop.total_epochs=auto: {epochs} epochs; at least 12") for _, text in said)


@pytest.mark.parametrize("size, micro", [(131, 1), (94, 47), (128, 64), (62, 62)])
def test_a_batch_without_a_divisor_near_the_cap_is_said(size, micro, said):
    found = plan(epoch_length=1000, total_epochs=1.0, global_batch_size=size, batch_size=64)
    assert found.micro_batch_size == micro
    warnings = [message for level, message in said if level == "WARNING"]
    assert len(warnings) == (micro == 1)
    if warnings:
        told = "the 131 samples of a rank have no divisor near loop.batch_size=64, so an update takes 131 mic"
        assert told in warnings[0]


def test_total_steps_win_over_total_epochs_and_say_so(said):
    found = plan(epoch_length=100, total_epochs=3.0, total_steps=7, global_batch_size=10)
    assert found.total_steps == 7
    assert ("INFO", "loop.total_steps=7 is set, so loop.total_epochs=3.0 is not used") in said


@pytest.mark.parametrize(
    "warmup, expected, why",
    [
        ({"warmup_epochs": 1.0, "warmup_steps": None}, 10, "one epoch of ten steps"),
        ({"warmup_epochs": 0.5, "warmup_steps": None}, 5, ""),
        ({"warmup_epochs": 0.0, "warmup_steps": None}, 0, "none"),
        ({"warmup_epochs": 5.0, "warmup_steps": 3}, 3, "steps win"),
        ({"warmup_epochs": 5.0, "warmup_steps": 0}, 0, "0 is a value"),
        ({"warmup_epochs": 9.0, "warmup_steps": None}, 30, "cut to the run's 30 steps"),
        ({"warmup_epochs": 0.0, "warmup_steps": 1000}, 30, "cut likewise"),
        ({"warmup_epochs": 3.0, "warmup_steps": None}, 30, "just as long as the run"),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warmup_steps(schedule, warmup, expected, why, said):
    found = plan(epoch_length=100, total_epochs=3.0, global_batch_size=10, schedule=schedule, warmup=warmup)
    assert found.warmup_steps == expected, why
    wanted = warmup["warmup_steps"] if warmup["warmup_steps"] is not None else 10 * warmup["warmup_epochs"]
    warnings = [message for level, message in said if level == "WARNING"]
    assert len(warnings) == (wanted > 30)
    if warnings:
        assert warnings[0].startswith("schedule.warmup_epochs or schedule.warmup_steps: a warm-up of")
        assert f"of {wanted:g} steps is longer than the run; it is cut to its 30 steps" in warnings[0]
    told = ("INFO", f"schedule.warmup_steps={warmup['warmup_steps']} is set, so schedule.warmup_epochs is not used")
    assert (told in said) == (warmup["warmup_steps"] is not None)


def test_onecycle_has_no_warmup_beside_its_own(said):
    assert plan(epoch_length=100, schedule="onecycle").warmup_steps == 0
    assert not any("warm" in text for _, text in said)
    told = "the momentum (beta1) goes from 0.95 to 0.85 and back; optim's own is that of a range test only"
    assert ("INFO", f"schedule.cycle_momentum: {told}") in said
    said.clear()
    plan(epoch_length=100, schedule="onecycle", warmup={"cycle_momentum": False})
    assert not any("momentum" in text for _, text in said)


@pytest.mark.parametrize(
    "batch, optim, expected, why",
    [
        (256, {"base_lr": 5e-4}, 5e-4, "base_lr is stated for 256 samples"),
        (4096, {"base_lr": 1.5e-4}, 2.4e-3, "the official pretraining"),
        (1024, {"base_lr": 6.25e-4}, 2.5e-3, "the official fine-tuning of base"),
        (32, {"base_lr": 0.08}, 0.01, "downwards as well"),
        (1024, {"lr": 0.3, "base_lr": 5e-4}, 0.3, "lr wins, unscaled"),
        (1024, {"lr": 0.0, "base_lr": 5e-4}, 0.0, "0 is a value"),
    ],
)
def test_the_rate_follows_the_batch(batch, optim, expected, why, said):
    found = plan(epoch_length=5000, global_batch_size=batch, optim=optim)
    assert found.lr == pytest.approx(expected, rel=1e-12), why
    base = optim["base_lr"]
    given = f"optim.lr={expected:g} is set, so optim.base_lr={base:g} is not used"
    derived = f"lr={expected:g}: optim.base_lr={base:g} x {batch} samples / 256"
    assert said == [("INFO", given if "lr" in optim else derived)]


def test_the_number_of_ranks_changes_neither_length_nor_rate():
    plans = [plan(epoch_length=1000, world_size=world, global_batch_size=240, batch_size=50) for world in (1, 2, 3, 8)]
    assert len({(each.total_steps, each.warmup_steps, each.lr, each.epoch_length) for each in plans}) == 1
    assert [(each.micro_batch_size, each.accum_steps) for each in plans] == [(48, 5), (40, 3), (40, 2), (30, 1)]
    assert all(each.micro_batch_size * each.accum_steps * each.world_size == 240 for each in plans)


def test_the_plan_in_one_line():
    found = plan(epoch_length=1000, world_size=2, total_epochs=2.0, global_batch_size=100, batch_size=25)
    assert found.describe() == (
        "steps=20 warmup_steps=10 lr=0.000195 global_batch_size=100 = 2 ranks x 2 accum_steps x 25 batch_size, "
        "epoch=1000 samples"
    )


# --- ends of epochs


def small_plan(length, batch, total_steps):
    return Plan(
        world_size=1, global_batch_size=batch, micro_batch_size=batch, accum_steps=1, epoch_length=length,
        total_steps=total_steps, warmup_steps=0, lr=1.0,
    )  # fmt: skip


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


@pytest.mark.parametrize(
    "length, batch, total, ends, why",
    [
        (10, 5, 6, [(0, 2), (1, 4), (2, 6)], "whole epochs"),
        (
            10,
            4,
            8,
            [(0, 3), (1, 5), (2, 8)],
            "12 is the first multiple of 4 at or beyond 10, 20 is one itself, 32 > 30",
        ),
        (10, 10, 3, [(0, 1), (1, 2), (2, 3)], "an update an epoch"),
        (10, 4, 4, [(0, 3), (1, 4)], "the run ends within the second epoch"),
        (10, 4, 2, [(0, 2)], "and within the first"),
        (7, 3, 7, [(0, 3), (1, 5), (2, 7)], "21 = 3 x 7"),
        (10, 25, 3, [(0, 1), (2, 2), (5, 3)], "an update of two and a half epochs ends the one that it began in"),
    ],
)
def test_ends_of_epochs(length, batch, total, ends, why):
    assert walk(small_plan(length, batch, total))[0] == ends, why


def awkward():
    for length in (1, 7, 10, 54, 97, 1000):
        for batch in (1, 2, 3, 7, 10, 53, 96, 97):
            for total in (1, 2, 9, 50, 51):
                yield small_plan(length, batch, total)


def test_each_epochs_end_is_reached_exactly_once():
    for plan in awkward():
        if plan.global_batch_size > plan.epoch_length:
            continue  # below
        ends, _ = walk(plan)
        assert [epoch for epoch, _ in ends] == list(range(len(ends)))
        for epoch, step in ends[:-1]:
            read, wanted = step * plan.global_batch_size, (epoch + 1) * plan.epoch_length
            assert read >= wanted > read - plan.global_batch_size  # the first step at or beyond the boundary
        assert ends[-1][1] == plan.total_steps


def test_an_epoch_starts_where_the_one_before_ended():
    for plan in awkward():
        starts = {0} | {step for _, step in walk(plan)[0][:-1]}
        assert {plan.epoch_start(step) for step in range(plan.total_steps)} == starts
        assert all(plan.epoch_start(step) == max(start for start in starts if start <= step)
                   for step in range(plan.total_steps))  # fmt: skip


def test_updates_longer_than_an_epoch_end_one_epoch_each():
    for plan in awkward():
        if plan.global_batch_size > plan.epoch_length:
            ends, _ = walk(plan)
            assert [step for _, step in ends] == list(range(1, plan.total_steps + 1))
            assert all(later > earlier for (earlier, _), (later, _) in zip(ends, ends[1:]))


def test_a_start_at_any_step_reaches_the_same_ends_and_evaluations():
    for plan in awkward():
        ends, due = walk(plan, 0.5)
        for start in {0, 1, plan.total_steps // 2, plan.total_steps - 1} & set(range(plan.total_steps)):
            assert walk(plan, 0.5, start) == (
                [(epoch, step) for epoch, step in ends if step > start],
                [step for step in due if step > start],
            )


@pytest.mark.parametrize("every", ["0.1", "0.3", "0.5", "1", "1.5", "3", "1000"])
def test_an_evaluation_is_due_at_the_first_step_at_or_beyond_each_multiple(every):
    for plan in awkward():
        samples = Fraction(every) * plan.epoch_length
        expected = [
            step
            for step in range(1, plan.total_steps + 1)
            if step == plan.total_steps
            or step * plan.global_batch_size // samples > (step - 1) * plan.global_batch_size // samples
        ]
        assert walk(plan, float(every))[1] == expected, plan


@pytest.mark.parametrize(
    "length, batch, total, every, due, why",
    [
        (10, 4, 8, 1.0, [3, 5, 8], "with the epochs' ends"),
        (10, 4, 8, 0.5, [2, 3, 4, 5, 7, 8], "5 10 15 20 25 30 are crossed by 8 12 16 20 28 32"),
        (10, 4, 9, 3.0, [8, 9], "30, and the end of the run"),
        (10, 4, 8, 3.0, [8], "once where both fall together"),
        (10, 20, 3, 0.5, [1, 2, 3], "once a step, though each crosses four multiples"),
        (10, 4, 5, 100.0, [5], "never but at the end"),
    ],
)
def test_due_steps(length, batch, total, every, due, why):
    assert walk(small_plan(length, batch, total), every)[1] == due, why


@pytest.mark.parametrize(
    "length, batch, total, among, every, due, why",
    [
        (10, 5, 12, 1.0, 2.0, [4, 8, 12], "every second evaluation"),
        (10, 5, 11, 1.0, 2.0, [4, 8, 11], "and the last one"),
        (10, 5, 12, 1.0, 1.5, [4, 6, 10, 12], "15 30 45 60, each at the first whole epoch at or beyond it"),
        (10, 5, 12, 1.5, 1.0, [3, 6, 9, 12], "at every evaluation where it is wanted more often"),
        (10, 4, 8, 0.5, 1.0, [3, 5, 8], "epochs that end within a step"),
        (10, 5, 6, 1.0, 100.0, [6], "never but at the end"),
        (10, 40, 3, 0.5, 2.0, [1, 2, 3], "once a step, though each crosses two multiples"),
    ],
)
def test_due_among_evaluations(length, batch, total, among, every, due, why):
    plan = small_plan(length, batch, total)
    assert [step for step in walk(plan, among)[1] if plan.is_due_among(step, every, among)] == due, why


@pytest.mark.parametrize("every", ["0.3", "1", "1.5", "3", "1000"])
@pytest.mark.parametrize("among", ["0.1", "0.5", "1", "2"])
def test_due_among_evaluations_is_the_first_at_or_beyond_each_multiple(every, among):
    for plan in awkward():
        evaluations = walk(plan, float(among))[1]
        samples = Fraction(every) * plan.epoch_length
        expected = [
            step
            for earlier, step in zip([0, *evaluations], evaluations)
            if step == plan.total_steps
            or step * plan.global_batch_size // samples > earlier * plan.global_batch_size // samples
        ]
        assert [step for step in evaluations if plan.is_due_among(step, float(every), float(among))] == expected, plan


def test_ten_evaluations_an_epoch_of_imagenet():
    length, batch = 1_281_167, 1024
    plan = small_plan(length, batch, math.ceil(3 * length / batch))
    assert len(walk(plan, 0.1)[1]) == 30


def test_epochs_read_so_far_are_a_fraction():
    plan = small_plan(10, 4, 8)
    assert [plan.epoch_at(step) for step in (0, 1, 5, 8)] == [0.0, 0.4, 2.0, 3.2]
