"""Schedules: pure functions of the step.

`step` counts the updates done so far: the first update uses the value at step 0. Nothing here has state.
"""

import math
from dataclasses import dataclass

from optim.config import ConstantConfig, CosineConfig, KnobConfig, OneCycleConfig, PhaseConfig, ScheduleConfig


def cosine(start: float, end: float, fraction: float) -> float:
    """Go from start to end along half a cosine; fraction in [0, 1]."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def linear(start: float, end: float, fraction: float) -> float:
    """Go from start to end in a straight line; fraction in [0, 1]."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)


@dataclass(frozen=True)
class GroupValues:
    """Values of an update: `lr` and `weight_decay` before a group's own scale; momentum None stays as configured."""

    lr: float
    weight_decay: float
    momentum: float | None = None


@dataclass(frozen=True)
class Schedule:
    """All scheduled values of one run.

    The rate follows the official ConvNeXt V2 rule (linear warm-up from 0, half a cosine to min_lr), per step.
    Source: facebookresearch/ConvNeXt-V2:utils.py adjust_learning_rate. Differs: warm-up counts from step + 1, so that
    the first update does not have rate 0.
    """

    config: ScheduleConfig
    lr: float
    weight_decay: float
    total_steps: int
    warmup_steps: int
    steps_per_epoch: float

    def at(self, step: int) -> GroupValues:
        """Return the optimiser's values for the update that follows `step` updates."""
        match self.config:
            case OneCycleConfig():
                return self._one_cycle(step)
            case ConstantConfig() | CosineConfig() if step < self.warmup_steps:
                rate = self.lr * (step + 1) / self.warmup_steps
                return GroupValues(rate, self._decay(step))
            case ConstantConfig():
                return GroupValues(self.lr, self.weight_decay)
            case CosineConfig():
                steps, restarts = max(1, self.total_steps - self.warmup_steps), self.config.restarts
                cycles = (step - self.warmup_steps) * (restarts + 1) / steps
                fraction = cycles - min(int(cycles), restarts)  # the last cycle ends at 1
                return GroupValues(cosine(self.lr, self.config.min_lr, fraction), self._decay(step))

    def knobs_at(self, step: int) -> dict[str, float]:
        """Return the task's scheduled values at a step."""
        return {name: self._knob_at(knob, step) for name, knob in self.config.knobs.items()}

    def _knob_at(self, knob: KnobConfig, step: int) -> float:
        """Return a knob's value. A phase that is longer than the run is cut at its end, not compressed."""
        value, first = knob.start, 0.0
        for phase in knob.phases:
            length = self._length(phase, first)
            if step < first + length:
                curve = cosine if phase.curve == "cosine" else linear
                # The last update of a phase without a duration has its end value.
                end = length if phase.has_duration else max(length - 1, 1)
                return curve(value, phase.to, (step - first) / end)
            value, first = phase.to, first + length
        return value

    def _length(self, phase: PhaseConfig, first: float) -> float:
        """Return a phase's length in steps."""
        if phase.steps is not None:
            return float(phase.steps)
        if phase.epochs is not None:
            return phase.epochs * self.steps_per_epoch
        if phase.fraction is not None:
            return phase.fraction * self.total_steps
        return max(self.total_steps - first, 1.0)

    def _decay(self, step: int) -> float:
        end = self.config.weight_decay_end if isinstance(self.config, CosineConfig) else None
        return self.weight_decay if end is None else cosine(self.weight_decay, end, step / max(1, self.total_steps))

    def _one_cycle(self, step: int) -> GroupValues:
        config = self.config
        assert isinstance(config, OneCycleConfig)
        curve = cosine if config.curve == "cosine" else linear
        start = 0.0
        for end, rates, momenta in self._cycle_phases(config):
            if step <= end or end == self.total_steps - 1:
                fraction = (step - start) / (end - start) if end > start else 1.0
                momentum = curve(*momenta, fraction) if config.cycle_momentum else None
                return GroupValues(curve(*rates, fraction), self.weight_decay, momentum)
            start = end
        raise AssertionError("the last phase ends with the run")

    def _cycle_phases(self, config: OneCycleConfig) -> list[tuple[float, tuple[float, float], tuple[float, float]]]:
        """Return the phases of a cycle: last step, and the rate and the momentum at both ends."""
        first, last = self.lr / config.div_factor, self.lr / config.div_factor / config.final_div_factor
        low, high = config.momentum_low, config.momentum_high
        peak, end = config.peak_fraction * self.total_steps - 1, self.total_steps - 1
        up = (peak, (first, self.lr), (high, low))
        if config.three_phase:
            return [up, (2 * peak, (self.lr, first), (low, high)), (end, (first, last), (high, high))]
        return [up, (end, (self.lr, last), (low, high))]
