"""Schedules. Literal tables at every step of 10-step runs, reference equality (torch's OneCycleLR), properties."""

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from optim.config import ScheduleConfig
from optim.schedules import Schedule, cosine, linear
from utils.config.entry_point import CONF

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


# --- cosine

COSINE_WARMUP_3 = [
    (1 / 3, "the first update has a third of the rate, not 0 as in the official code"),
    (2 / 3, "linear"),
    (1.0, "the last step of the warm-up has the full rate"),
    (1.0, "the cosine begins at its top, 0 of 7"),
    (0.9504844339512095, "(1 + cos(pi 1/7)) / 2"),
    (0.8117449009293668, "(1 + cos(pi 2/7)) / 2"),
    (0.6112604669781572, "(1 + cos(pi 3/7)) / 2"),
    (0.3887395330218428, "4/7, mirrors 3/7 round one half"),
    (0.1882550990706332, "5/7, mirrors 2/7"),
    (0.0495155660487905, "6/7: min_lr would be reached by the update after the last"),
]
COSINE_NO_WARMUP = [
    (1.0, "no warm-up: the first update has the full rate"),
    (0.9755282581475768, "(1 + cos(pi/10)) / 2"),
    (0.9045084971874737, "(1 + cos(pi/5)) / 2 = (5 + sqrt 5) / 8"),
    (0.7938926261462366, ""),
    (0.6545084971874737, ""),
    (0.5, "half way"),
    (0.3454915028125263, "mirrors step 4"),
    (0.2061073738537634, ""),
    (0.0954915028125263, ""),
    (0.0244717418524232, ""),
]
COSINE_MIN_LR = [
    (0.2, "lr 0.4 of a warm-up of 2: half the rate; min_lr plays no part in the warm-up"),
    (0.4, "full rate"),
    (0.4, "top of the cosine from 0.4 to 0.1 in 8 steps"),
    (0.3885819298766930, "0.1 + 0.3 (1 + cos(pi 1/8)) / 2"),
    (0.3560660171779821, "0.1 + 0.3 (2 + sqrt 2) / 4"),
    (0.3074025148547635, ""),
    (0.25, "half way between 0.4 and 0.1"),
    (0.1925974851452365, ""),
    (0.1439339828220179, "0.1 + 0.3 (2 - sqrt 2) / 4"),
    (0.1114180701233070, "above min_lr to the last step"),
]
COSINE_RESTARTS = [
    (0.5, "warm-up of 2"),
    (1.0, "full rate"),
    (1.0, "first of two cycles of 4"),
    (0.8535533905932737, "(2 + sqrt 2) / 4"),
    (0.5, "half way"),
    (0.1464466094067262, "(2 - sqrt 2) / 4"),
    (1.0, "the restart, at the full rate"),
    (0.8535533905932737, ""),
    (0.5, ""),
    (0.1464466094067262, "0 would be reached by the update after the last"),
]


@pytest.mark.parametrize(
    "settings, table",
    [
        ({"warmup": 3}, COSINE_WARMUP_3),
        ({"warmup": 0}, COSINE_NO_WARMUP),
        ({"lr": 0.4, "warmup": 2, "min_lr": 0.1}, COSINE_MIN_LR),
        ({"warmup": 2, "restarts": 1}, COSINE_RESTARTS),
    ],
    ids=["warmup", "no_warmup", "min_lr", "restarts"],
)
def test_cosine_at_every_step(settings, table):
    close(rates(make("cosine", **settings)), [rate for rate, _ in table], 1e-14)


@pytest.mark.parametrize("end", [0.4, 0.0])
def test_weight_decay_goes_to_its_end_along_a_cosine_without_warmup(end):
    schedule = make("cosine", weight_decay=0.04, weight_decay_end=end, warmup=3)
    shares = [rate for rate, _ in COSINE_NO_WARMUP]  # it moves from the first step on, warm-up or not
    close([schedule.at(step).weight_decay for step in range(STEPS)], [end + (0.04 - end) * share for share in shares])


# --- constant

CONSTANT_WARMUP_4 = [
    *[(0.5, "lr 2, a quarter of it"), (1.0, ""), (1.5, ""), (2.0, "full rate")],
    *[(2.0, "and there it stays")] * 6,
]


def test_constant_at_every_step():
    schedule = make("constant", lr=2.0, warmup=4)
    close(rates(schedule), [rate for rate, _ in CONSTANT_WARMUP_4])
    assert [schedule.at(step).weight_decay for step in range(STEPS)] == [0.5] * STEPS
    assert rates(make("constant", lr=2.0)) == [2.0] * STEPS


# --- one cycle

ONE_CYCLE = [
    (0.04, 0.95, "1 / 25, momentum high"),
    (0.52, 0.90, "half way up: (0.04 + 1) / 2"),
    (1.0, 0.85, "peak at 0.3 x 10 - 1 = step 2, momentum low"),
    (0.9504846320134737, 0.8549515566048790, "1/7 of the way down to 4e-6"),
    (0.8117456539497631, 0.8688255099070633, "2/7"),
    (0.6112620219362892, 0.8888739533021843, "3/7"),
    (0.3887419780637108, 0.9111260466978157, "4/7"),
    (0.1882583460502369, 0.9311744900929367, "5/7"),
    (0.0495193679865263, 0.9450484433951210, "6/7"),
    (4e-6, 0.95, "1 / 25 / 10000 at the last step, momentum high again"),
]


def test_onecycle_at_every_step():
    values = [make("onecycle").at(step) for step in range(STEPS)]
    close([value.lr for value in values], [rate for rate, _, _ in ONE_CYCLE], 1e-14)
    close([value.momentum for value in values], [momentum for _, momentum, _ in ONE_CYCLE], 1e-14)
    assert all(value.weight_decay == 0.5 for value in values)
    assert [make("onecycle", cycle_momentum=False).at(step).momentum for step in range(STEPS)] == [None] * STEPS


CYCLES = [
    (total, peak_fraction, curve, three_phase)
    for total, peak_fraction in [(100, 0.25), (12, 0.9), (2, 0.3)]
    for curve in ("cosine", "linear")
    for three_phase in (False, True)
    if not three_phase or peak_fraction <= 0.5  # above, there is no time for the way down
]


@pytest.mark.parametrize("total, peak_fraction, curve, three_phase", CYCLES)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_onecycle_equals_torch(total, peak_fraction, optimizer_class, curve, three_phase):
    """For two groups with rates of their own, as optim.layer_decay makes them."""
    shape = {"div_factor": 10.0, "final_div_factor": 50.0, "three_phase": three_phase}
    scales = (1.0, 0.25)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in scales]
    optimizer = optimizer_class(groups, lr=0.3)
    rates = [0.3 * scale for scale in scales]
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rates, total_steps=total, pct_start=peak_fraction, base_momentum=0.8, max_momentum=0.9,
        anneal_strategy={"cosine": "cos", "linear": "linear"}[curve], **shape,
    )  # fmt: skip
    ours = make(
        "onecycle", lr=0.3, total=total, peak_fraction=peak_fraction, momentum_low=0.8, momentum_high=0.9,
        curve=curve, **shape,
    )  # fmt: skip
    for step in range(total):
        for group, scale in zip(optimizer.param_groups, scales):
            momentum = group["betas"][0] if "betas" in group else group["momentum"]
            assert ours.at(step).lr * scale == pytest.approx(group["lr"], rel=1e-12, abs=1e-12), step
            assert ours.at(step).momentum == pytest.approx(momentum, rel=1e-12, abs=1e-12), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total, peak_fraction", [(10, 0.1), (1, 0.3), (1, 0.9)])
def test_onecycle_has_values_where_the_peak_is_the_first_step(total, peak_fraction):
    """torch divides by zero at 10 steps and 0.1."""
    schedule = make("onecycle", total=total, peak_fraction=peak_fraction)
    for step in range(total):
        assert 0 < schedule.at(step).lr <= 1 and 0.85 <= schedule.at(step).momentum <= 0.95


def test_a_momentum_that_would_rise_to_the_peak_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.momentum_low: 0\.99"):
        make("onecycle", momentum_low=0.99)


# --- a task's own values


@pytest.mark.parametrize("curve", [cosine, linear])
def test_a_curve_of_a_device_scalar_is_that_of_a_number(curve):
    for fraction in (-1.0, 0.0, 1 / 9, 0.5, 1.0, 7.0):
        found = curve(4.0, -2.0, torch.tensor(fraction))
        assert found.shape == () and found.item() == pytest.approx(curve(4.0, -2.0, fraction), abs=1e-6)


def test_progress_goes_from_the_first_update_to_the_last():
    assert [make("cosine", total=5).progress_at(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert make("onecycle", total=1).progress_at(0) == 0.0
