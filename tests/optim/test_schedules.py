"""Schedules. Literal tables at every step of 10-step runs, reference equality (torch's OneCycleLR), properties."""

import math

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from optim.config import ScheduleConfig
from optim.schedules import Schedule, cosine, linear
from utils.config.help import CONF

STEPS = 10


def make(name, *, lr=1.0, weight_decay=0.5, total=STEPS, warmup=0, **changes):
    """A schedule of conf/schedule/<name>.yaml with some keys changed."""
    values = yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text()) | changes
    config = TypeAdapter(ScheduleConfig).validate_python(values)
    return Schedule(config, lr, weight_decay, total, warmup)


def rates(schedule):
    return [schedule.at(step).lr for step in range(schedule.total_steps)]


def close(found, expected, tolerance=1e-12):
    assert len(found) == len(expected)
    for step, (have, want) in enumerate(zip(found, expected)):
        assert have == pytest.approx(want, rel=tolerance, abs=tolerance), f"step {step}"


def half_cosine(steps, end=0.0, start=1.0):
    """The rates of a cosine in so many steps; its end would be reached by the update after the last."""
    return [end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


@pytest.mark.parametrize(
    "settings, table",
    [
        ({"warmup": 3}, [1 / 3, 2 / 3, 1.0, *half_cosine(7)]),
        ({"warmup": 0}, half_cosine(10)),
        ({"lr": 0.4, "warmup": 2, "min_lr": 0.1}, [0.2, 0.4, *half_cosine(8, 0.1, 0.4)]),
        ({"warmup": 2, "restarts": 1}, [0.5, 1.0, *half_cosine(4), *half_cosine(4)]),
    ],
    ids=["warmup", "no_warmup", "min_lr", "restarts"],
)
def test_cosine_at_every_step(settings, table):
    close(rates(make("cosine", **settings)), table, 1e-14)


@pytest.mark.parametrize("end", [0.4, 0.0])
def test_weight_decay_goes_to_its_end_along_a_cosine_without_warmup(end):
    schedule = make("cosine", weight_decay=0.04, weight_decay_end=end, warmup=3)
    found = [schedule.at(step).weight_decay for step in range(STEPS)]
    close(found, half_cosine(10, end, 0.04))  # it moves from the first step on, warm-up or not


def test_constant_at_every_step():
    schedule = make("constant", lr=2.0, warmup=4)
    close(rates(schedule), [0.5, 1.0, 1.5, *[2.0] * 7])
    assert [schedule.at(step).weight_decay for step in range(STEPS)] == [0.5] * STEPS


# --- one cycle

CYCLES = [
    (total, peak_fraction, curve, three_phase)
    for total, peak_fraction in [(100, 0.25), (12, 0.9)]
    for curve in ("cosine", "linear")
    for three_phase in (False, True)
    if not three_phase or peak_fraction <= 0.5  # above, there is no time for the way down
]


@pytest.mark.parametrize("total, peak_fraction, curve, three_phase", CYCLES)
def test_onecycle_equals_torch(total, peak_fraction, curve, three_phase):
    shape = {"div_factor": 10.0, "final_div_factor": 50.0, "three_phase": three_phase}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=total, pct_start=peak_fraction, base_momentum=0.8, max_momentum=0.9,
        anneal_strategy={"cosine": "cos", "linear": "linear"}[curve], **shape,
    )  # fmt: skip
    ours = make(
        "onecycle", lr=0.3, total=total, peak_fraction=peak_fraction, momentum_low=0.8, momentum_high=0.9,
        curve=curve, **shape,
    )  # fmt: skip
    (group,) = optimizer.param_groups
    assert make("onecycle", cycle_momentum=False).at(0).momentum is None and ours.at(0).weight_decay == 0.5
    for step in range(total):
        assert ours.at(step).lr == pytest.approx(group["lr"], rel=1e-12, abs=1e-12), step
        assert ours.at(step).momentum == pytest.approx(group["momentum"], rel=1e-12, abs=1e-12), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total, peak_fraction", [(10, 0.1), (1, 0.3), (1, 0.9)])
def test_onecycle_has_values_where_the_peak_is_the_first_step(total, peak_fraction):
    """torch divides by zero at 10 steps and 0.1."""
    schedule = make("onecycle", total=total, peak_fraction=peak_fraction)
    for step in range(total):
        assert 0 < schedule.at(step).lr <= 1 and 0.85 <= schedule.at(step).momentum <= 0.95


@pytest.mark.parametrize("curve", [cosine, linear])
def test_a_curve_of_a_device_scalar_is_that_of_a_number(curve):
    for fraction in (-1.0, 0.0, 1 / 9, 0.5, 1.0, 7.0):
        found = curve(4.0, -2.0, torch.tensor(fraction))
        assert found.shape == () and found.item() == pytest.approx(curve(4.0, -2.0, fraction), abs=1e-6)


def test_progress_goes_from_the_first_update_to_the_last():
    assert [make("cosine", total=5).progress_at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert make("onecycle", total=1).progress_at(0) == 0.0
