"""What a range test says: curves with a valley, with noise, with instabilities, and without an answer."""

import math

import pytest
import torch

from engine.lr_suggestion import Curve, smooth
from engine.lr_suggestion import suggest as suggest_for
from utils.rng import generator_for

RATES = [10 ** (-4 + 4 * number / 80) for number in range(81)]
FACTOR = 0.8


def suggest(curve, method, smoothing, adaptive=False):
    """For SGD, where nothing else is said."""
    return suggest_for(curve, method, smoothing, adaptive=adaptive)


def make_curve(loss_at, rates=RATES, diverged=False):
    losses = [loss_at(rate) for rate in rates]
    return Curve(rates, losses, losses, diverged)


def valley(rate):
    """Fall around 3e-3 over the logarithm of the rate, lowest at 0.1, then rise."""
    place = math.log10(rate)
    return 2.0 - 1.0 / (1 + math.exp(-6 * (place + 2.5))) + max(0.0, place + 1) ** 2 * 5


def test_smoothing_corrects_the_bias_of_the_first_means():
    assert smooth([4.0, 2.0, 2.0], 0.5) == pytest.approx([4.0, (1.0 + 1.0) / 0.75, (0.5 + 0.5 + 1.0) / 0.875])
    assert smooth([3.0] * 5, 0.98) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


@pytest.mark.parametrize(
    "method, rate",
    [("steepest", 10**-2.5), ("minimum_half", 0.05), ("minimum_tenth", 0.01), ("valley", 0.01), ("auto", 0.05)],
)
def test_a_curve_with_a_valley(method, rate):
    found = suggest(make_curve(valley), method, FACTOR)
    assert found.taken == pytest.approx(rate, rel=0.15) and found.taken in found.rates.values()
    assert set(found.rates) == {"steepest", "minimum_half", "minimum_tenth", "valley"}
    assert found.method == ("minimum_half" if method == "auto" else method)
    auto = "minimum_half, the greatest of the four; the loss is lowest at 0.1"
    assert found.reason == (auto if method == "auto" else f"lr_finder.suggestion={method}")


def test_an_adaptive_optimiser_takes_the_least():
    found = suggest(make_curve(valley), "auto", FACTOR, adaptive=True)
    assert found.method == "steepest" and found.taken == min(found.rates.values()) == pytest.approx(10**-2.5, rel=0.15)
    assert found.reason == "steepest, the least of the four, for an adaptive optimiser; the loss is lowest at 0.1"
    assert suggest(make_curve(valley), "valley", FACTOR, adaptive=True).method == "valley"


def test_all_suggestions_are_below_the_rate_of_the_lowest_loss():
    """Also where the loss falls at the end alone."""

    def late(rate):
        return 2.0 - 1.0 / (1 + math.exp(-20 * (math.log10(rate) + 1.2))) + 50 * max(0.0, rate - 0.1)

    found = suggest(make_curve(late), "auto", FACTOR)
    assert found.taken == max(found.rates.values()) and 0.05 < found.taken < 0.1


@pytest.mark.parametrize("last, warns", [(0.01, True), (0.08, True), (0.2, False), (1.0, False)])
def test_a_test_that_ends_in_the_fall_says_so(last, warns):
    """The lowest loss is at 0.1."""
    rates = [10 ** (-4 + (math.log10(last) + 4) * number / 80) for number in range(81)]
    found = suggest(make_curve(valley, rates), "auto", FACTOR)
    told = f"the loss still falls at {last:.3g}, the end of the test, so a higher rate may be better; set a higher "
    assert found.taken is not None
    assert found.warning == (told + "lr_finder.end_lr" if warns else None)


def test_a_linear_sweep_over_decades_has_an_answer():
    """Its second rate is 0.1: what the loss is without training is in the first few alone."""
    rates = [1e-5 + number / 10 for number in range(100)]
    losses = [6.0 - 4.0 * math.exp(-((rate - 2.0) ** 2)) + 4.0 * max(0.0, rate - 2.0) for rate in rates]
    found = suggest(Curve(rates, losses, smooth(losses, 0.5), False), "auto", 0.5)
    assert 0.3 < found.taken < 2.0 and found.warning is None


def test_what_comes_after_the_first_instability_is_not_read():
    """A loss that jumps up and falls again far above the usable rates, as batch norm makes it."""
    jumps = make_curve(lambda rate: valley(rate) if rate < 0.2 else 1.6 - (rate - 0.2))
    assert suggest(jumps, "auto", FACTOR).rates == suggest(make_curve(valley), "auto", FACTOR).rates
    assert min(jumps.losses) < min(make_curve(valley).losses)


# The losses of `python train.py` in float32, 1e-5 to 10: they jump from about 1 on, and fall again far above.
JUMPS = """
    6.867 6.895 6.915 6.861 6.869 6.946 6.864 6.890 6.867 6.915 6.866 6.858 6.874 6.865 6.868 6.932 6.864
    6.871 6.955 6.940 6.966 6.851 6.923 6.901 6.860 6.862 6.870 6.967 6.936 6.862 6.877 6.912 6.881 6.918
    6.927 6.933 6.916 6.900 6.917 6.869 6.934 6.897 6.905 6.858 6.884 6.931 6.878 6.878 6.894 6.865 6.897
    6.910 6.900 6.813 6.875 6.827 6.833 6.907 6.884 6.829 6.837 6.831 6.837 6.692 6.737 6.750 6.739 6.638
    6.743 6.643 6.684 6.614 6.636 6.627 6.654 6.700 6.472 6.570 6.559 6.714 6.691 6.772 6.774 6.668 6.884
    6.651 6.855 6.548 6.753 6.446 6.560 6.371 6.345 6.348 6.474 6.426 6.411 6.921 6.751 6.648
"""


def test_a_network_with_batch_norm_is_read_up_to_its_jumps():
    """The best rates of a grid are 0.3 and 0.5; smoothed, the losses rise by a fifth of their fall only."""
    losses = [float(loss) for loss in JUMPS.split()]
    rates = [10 ** (-5 + 6 * number / 99) for number in range(100)]
    found = suggest(Curve(rates, losses, smooth(losses, 0.9), False), "auto", 0.9)
    assert 0.1 < found.taken < 0.9


def flat_falls_diverges(rate):
    """Flat up to 1e-3, a fall of 1 up to 0.3, then up."""
    place = math.log10(rate)
    return 6.0 - 1.0 / (1 + math.exp(-5 * (place + 1.8))) + 30 * max(0.0, place + 0.5) ** 2


def make_noisy(noise, seed, smoothing, steps=100):
    """Return a curve of the default rates and smoothing, with normal noise; it ends where it diverges."""
    rates = [10 ** (-5 + 6 * number / (steps - 1)) for number in range(steps)]
    drawn = torch.randn(steps, generator=generator_for(seed), dtype=torch.float64).tolist()
    losses = [flat_falls_diverges(rate) + noise * value for rate, value in zip(rates, drawn)]
    return Curve(rates, losses, smooth(losses, smoothing), False)


@pytest.mark.parametrize(
    "steps, smoothing, noise", [(100, 0.9, 0.1), (100, 0.9, 0.2), (400, 0.98, 0.3), (400, 0.98, 0.6), (400, 0.98, 0.9)]
)
def test_noise_is_not_taken_for_an_instability(steps, smoothing, noise):
    """More steps, smoothed more, bear more noise."""
    exact = suggest(make_noisy(0.0, 0, smoothing, steps), "auto", smoothing).taken
    for seed in range(10):
        found = suggest(make_noisy(noise, seed, smoothing, steps), "auto", smoothing)
        assert exact / 3 < found.taken < exact * 3, seed


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_a_flat_curve_has_no_answer_however_it_is_smoothed(smoothing):
    """Without smoothing, too, the noise is seen; one curve in a hundred may be taken for a fall."""
    answers = []
    for seed in range(100):
        drawn = 2.0 + 0.3 * torch.randn(81, generator=generator_for(seed), dtype=torch.float64)
        curve = Curve(RATES, drawn.tolist(), smooth(drawn.tolist(), smoothing), False)
        answers.append(suggest(curve, "auto", smoothing).taken)
    assert sum(taken is not None for taken in answers) <= 1


NO_ANSWER = {
    "flat": (make_curve(lambda rate: 2.0), "the loss is flat (from 2 to 2); set a higher lr_finder.end_lr"),
    "noise alone": (
        make_curve(lambda rate: 2.0 + 0.3 * math.sin(1e6 * rate)),
        "the loss is flat",
    ),
    "diverges at once": (
        make_curve(valley, RATES[:7], diverged=True),
        "the loss diverged after 7 updates; set a lower lr_finder.start_lr",
    ),
    "diverges without a fall": (
        make_curve(lambda rate: 2.0 + 100 * max(0.0, rate - 1e-3), diverged=True),
        "the loss diverges without falling below the 2 of its start; set a lower lr_finder.start_lr",
    ),
    "short": (make_curve(valley, RATES[:7]), "7 updates are too few; allow more with lr_finder.steps"),
    "nothing": (Curve([], [], [], True), "the loss diverged after 0 updates"),
}


@pytest.mark.parametrize("case", NO_ANSWER)
def test_a_curve_without_an_answer(case):
    curve, reason = NO_ANSWER[case]
    found = suggest(Curve(curve.rates, curve.losses, smooth(curve.losses, FACTOR), curve.diverged), "auto", FACTOR)
    assert found.taken is None and found.rates == {} and found.reason.startswith(reason)


def test_of_a_flat_bottom_the_end_counts():
    """Where noise makes it lowest says nothing."""

    def flat_bottom(rate):
        return valley(min(rate, 0.01)) + (0.0 if rate < 0.3 else 30 * math.log10(rate / 0.3))

    tail = [0.01 * (-1) ** number for number in range(len(RATES))]
    losses = [flat_bottom(rate) + noise for rate, noise in zip(RATES, tail)]
    found = suggest(Curve(RATES, losses, losses, False), "minimum_half", 0.0)
    assert losses.index(min(losses)) < RATES.index(0.1) and 0.1 < found.taken < 0.16
