"""What a range test says: from losses at rising learning rates to a rate, or the reason why there is none.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), section 3.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_LEAST_POINTS = 20
# The least rise in standard deviations of the smoothed loss, and the least fall as a share of the first losses.
_NOISE_FACTOR, _LEAST_FALL = 3.0, 0.01
_UNSTABLE_RISE = 0.25  # of the fall before
# The same for means that follow the loss more closely: with fewer losses in a mean, noise alone goes further.
_CLOSE_FACTOR, _CLOSE_RISE, _CLOSE_NOISE = 0.6, 0.5, 7.0
_BEGUN = 0.1  # of the whole fall: then it has begun
_EDGE = 5  # the first smoothed losses are means of few, so their slopes are noise


@dataclass(frozen=True)
class Curve:
    """A range test: learning rates, ascending; losses and smoothed losses at them; whether the last one diverged.

    first_update_sec: the first update, which compiles where the run is compiled.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    diverged: bool
    first_update_sec: float = 0.0


@dataclass(frozen=True)
class Suggestion:
    """Rates by method, the one that is taken and its method (None: no answer in the curve), and why.

    warning: why the rate may be too low, if so.
    """

    taken: float | None
    reason: str
    rates: dict[str, float] = field(default_factory=dict)
    method: str | None = None
    warning: str | None = None


def smooth(losses: Sequence[float], factor: float) -> list[float]:
    """Return exponential means with bias correction; a greater `factor` in [0, 1) forgets more slowly."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = factor * mean + (1.0 - factor) * loss
        means.append(mean / (1.0 - factor**number))
    return means


def suggest(curve: Curve, method: str, smoothing: float, *, adaptive: bool) -> Suggestion:
    """Return what a curve suggests by `method`. All rates are below that of the lowest loss, which may be unstable.

    steepest: where the loss falls fastest. minimum_half, minimum_tenth: a half and a tenth of the rate of the lowest
    loss (Smith takes a little less than the rate where the loss becomes ragged). valley: half way, in updates, from
    where it begins to fall to where it is lowest. auto: the greatest; for an adaptive optimiser the least, because its
    first updates bear rates with which a whole run learns less (docs/lr_finder.md has the figures).

    smoothing: the factor that the curve was smoothed with.
    """
    problem = _find_problem(curve, smoothing)
    if problem is not None:
        return Suggestion(None, problem)
    start, lowest = _find_fall(curve, smoothing)
    rates = {
        "steepest": curve.rates[_steepest(curve.rates, curve.smoothed, start, lowest)],
        "minimum_half": curve.rates[lowest] / 2.0,
        "minimum_tenth": curve.rates[lowest] / 10.0,
        "valley": curve.rates[(start + lowest) // 2],
    }
    warning = _warn_of_the_end(curve, start, lowest)
    if method != "auto":
        return Suggestion(rates[method], f"lr_finder.suggestion={method}", rates, method, warning)
    name = (min if adaptive else max)(rates, key=rates.__getitem__)
    which = "least of the four, for an adaptive optimiser" if adaptive else "greatest of the four"
    reason = f"{name}, the {which}; the loss is lowest at {curve.rates[lowest]:.3g}"
    return Suggestion(rates[name], reason, rates, name, warning)


def _find_problem(curve: Curve, smoothing: float) -> str | None:
    """Return why a curve has no answer."""
    count, smoothed = len(curve.losses), np.asarray(curve.smoothed)
    if count < _LEAST_POINTS and not curve.diverged:
        return f"{count} updates are too few; allow more with lr_finder.steps and lr_finder.max_share"
    if count < _LEAST_POINTS:
        return f"the loss diverged after {count} updates; set a lower lr_finder.start_lr"
    lowest = _EDGE + int(smoothed[_EDGE:].argmin())
    first, low = _first_loss(curve), float(smoothed[lowest])
    if first - low >= _least_fall(curve, smoothing, lowest):
        return None
    if curve.diverged:
        return (
            f"the loss diverges without falling below the {first:.4g} of its start; set a lower lr_finder.start_lr or "
            "more lr_finder.steps"
        )
    return f"the loss is flat (from {first:.4g} to {low:.4g}); set a higher lr_finder.end_lr or more lr_finder.steps"


def _warn_of_the_end(curve: Curve, start: int, lowest: int) -> str | None:
    """Return a warning where the loss still falls at the last rates."""
    last = len(curve.smoothed) - 1
    fall, rise = (curve.smoothed[place] - curve.smoothed[lowest] for place in (start, last))
    if curve.diverged or lowest < last - last // 20 or rise > _UNSTABLE_RISE * fall:
        return None
    return (
        f"the loss still falls at {curve.rates[last]:.3g}, the end of the test, so a higher rate may be better; "
        "set a higher lr_finder.end_lr"
    )


def _edge(rates: Sequence[float]) -> int:
    """Return how many of the first rates are too low to change anything: an eighth of their range, in logarithms."""
    limit = rates[0] * (rates[-1] / rates[0]) ** 0.125
    return max(_EDGE, sum(rate < limit for rate in rates))


def _first_loss(curve: Curve) -> float:
    """Return the median of the losses before any rate changes them."""
    return float(np.median(curve.losses[: _edge(curve.rates)]))


def _noise_of_one(losses: Sequence[float]) -> float:
    """Return the standard deviation of one loss, from differences of successive losses where the rates are low."""
    return float(np.std(np.diff(losses[: len(losses) // 2]))) / math.sqrt(2)


def _noise(curve: Curve, smoothing: float, place: int) -> float:
    """Return the standard deviation of the smoothed loss at `place`."""
    forgotten = smoothing ** (place + 1)  # the first means are of few
    share = (1 - smoothing) / (1 + smoothing) * (1 + forgotten) / (1 - forgotten)
    return _noise_of_one(curve.losses) * math.sqrt(share)


def _least_fall(curve: Curve, smoothing: float, lowest: int) -> float:
    """Return how far the smoothed loss at `lowest`, the lowest of all, must be below the first to be more than noise.

    The least of n independent normal values is about sqrt(2 ln n) deviations below their mean.
    """
    independent = max(1.0, len(curve.losses) * (1.0 - smoothing))
    deviations = max(_NOISE_FACTOR, 1.0 + math.sqrt(2.0 * math.log(independent)))
    of_first = 1.25 * _noise_of_one(curve.losses) / math.sqrt(_edge(curve.rates))  # of a median of normal values
    noise = math.hypot(of_first, _noise(curve, smoothing, lowest))
    return max(deviations * noise, _LEAST_FALL * abs(_first_loss(curve)))


def _find_fall(curve: Curve, smoothing: float) -> tuple[int, int]:
    """Return where the loss begins to fall for good, and its lowest point before it becomes unstable.

    Where the bottom is flat, that is its end: the last point that is above the lowest by no more than noise.

    Unstable: the loss rises by a quarter of its fall, or, smoothed less, by half of it, and by more than noise. A
    network with batch norm hardly diverges: far above a usable rate its loss jumps up and down, and may fall again.
    """
    smoothed, lowest, first = curve.smoothed, _EDGE, _first_loss(curve)
    close_smoothing = min(_CLOSE_FACTOR, smoothing)
    close, close_low = smooth(curve.losses, close_smoothing), math.inf
    least_jump = _CLOSE_NOISE * _noise(curve, close_smoothing, len(close))
    for place in range(_EDGE, len(smoothed)):
        if smoothed[place] < smoothed[lowest]:
            lowest = place
        close_low = min(close_low, close[place])
        fall, rise = first - smoothed[lowest], smoothed[place] - smoothed[lowest]
        rises = rise > max(_UNSTABLE_RISE * fall, _NOISE_FACTOR * _noise(curve, smoothing, lowest))
        jumps = close[place] - close_low > max(_CLOSE_RISE * (first - close_low), least_jump)
        if (rises or jumps) and fall > _least_fall(curve, smoothing, lowest):
            break
    limit = smoothed[lowest] + _noise(curve, smoothing, lowest)
    while lowest + 1 < len(smoothed) and smoothed[lowest + 1] <= limit:
        lowest += 1
    fall = first - smoothed[lowest]
    starts = [place for place in range(_EDGE, lowest) if smoothed[place] > first - _BEGUN * fall]
    return max(starts, default=_EDGE), lowest


def _steepest(rates: Sequence[float], smoothed: Sequence[float], start: int, lowest: int) -> int:
    """Return the point of steepest descent over the logarithm of the rate; a slope spans points, against noise."""
    span = max(1, len(rates) // 30)
    slopes = {
        place: (smoothed[place + span] - smoothed[place - span]) / math.log(rates[place + span] / rates[place - span])
        for place in range(max(start, span), lowest + 1)
        if place + span <= lowest
    }
    return min(slopes, key=slopes.__getitem__, default=lowest)
