"""Schedules. Literal tables at every step of 10-step runs, reference equality (torch's OneCycleLR), properties."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from bench.measure import read_values
from optim.config import ScheduleConfig
from optim.schedules import Schedule, cosine, linear

STEPS = 10


def make(name, *, lr=1.0, weight_decay=0.5, total=STEPS, warmup=0, **changes):
    """A schedule of conf/schedule/<name>.yaml with some keys changed."""
    config = TypeAdapter(ScheduleConfig).validate_python(read_values("schedule", name) | changes)
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


def test_constant_at_every_step():
    schedule = make("constant", lr=2.0, warmup=4)
    close(rates(schedule), [0.5, 1.0, 1.5, *[2.0] * 7])
    assert [schedule.at(step).weight_decay for step in range(STEPS)] == [0.5] * STEPS


# --- one cycle


@pytest.mark.parametrize("total", [100, 12])
@pytest.mark.parametrize("curve, name", [("cosine", "cos"), ("linear", "linear")])
def test_onecycle_equals_torch(total, curve, name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total, anneal_strategy=name)
    ours = make("onecycle", lr=0.3, total=total, curve=curve)
    (group,) = optimizer.param_groups
    assert make("onecycle", cycle_momentum=False).at(0).momentum is None and ours.at(0).weight_decay == 0.5
    for step in range(total):
        assert ours.at(step).lr == pytest.approx(group["lr"], rel=1e-12, abs=1e-12), step
        assert ours.at(step).momentum == pytest.approx(group["momentum"], rel=1e-12, abs=1e-12), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_onecycle_has_values_where_the_peak_is_the_first_step(total):
    for step in range(total):
        values = make("onecycle", total=total).at(step)
        assert 0 < values.lr <= 1 and 0.85 <= values.momentum <= 0.95


@pytest.mark.parametrize("curve", [cosine, linear])
def test_a_curve_of_a_device_scalar_is_that_of_a_number(curve):
    for fraction in (-1.0, 0.0, 1 / 9, 0.5, 1.0, 7.0):
        found = curve(4.0, -2.0, torch.tensor(fraction))
        assert found.shape == () and found.item() == pytest.approx(curve(4.0, -2.0, fraction), abs=1e-6)


def test_progress_goes_from_the_first_update_to_the_last():
    assert [make("cosine", total=5).progress_at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert make("onecycle", total=1).progress_at(0) == 0.0
