"""Schedules: pure functions of the step.

`step` counts the updates done so far, so the value for the first update is the one at step 0. Nothing here has state;
resuming needs only the step.
"""

import math
from dataclasses import dataclass

from optim.config import ConstantConfig, CosineConfig, KnobConfig, OneCycleConfig, ScheduleConfig


def cosine(start: float, end: float, fraction: float) -> float:
    """Go from start to end along half a cosine; fraction in [0, 1]."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def linear(start: float, end: float, fraction: float) -> float:
    """Go from start to end in a straight line; fraction in [0, 1]."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)


def knob_value(knob: KnobConfig, fraction: float) -> float:
    """Return a task's scheduled value at a fraction of the run."""
    match knob.curve:
        case "cosine":
            return cosine(knob.start, knob.end, fraction)
        case "linear":
            return linear(knob.start, knob.end, fraction)
        case "constant":
            return knob.start


@dataclass(frozen=True)
class GroupValues:
    """What the optimiser's groups get at a step: `lr` and `weight_decay` before a group's own scale."""

    lr: float
    weight_decay: float
    momentum: float | None = None


@dataclass(frozen=True)
class Schedule:
    """All scheduled values of one run.

    The rate follows the official ConvNeXt V2 rule (linear warm-up from 0, half a cosine to min_lr), per step.
    Source: facebookresearch/ConvNeXt-V2:utils.py adjust_learning_rate. Differs: warm-up counts from step + 1, so that
    the first update is not lost to a rate of 0.
    """

    config: ScheduleConfig
    lr: float
    weight_decay: float
    total_steps: int
    warmup_steps: int

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
                fraction = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
                return GroupValues(cosine(self.lr, self.config.min_lr, fraction), self._decay(step))

    def knobs_at(self, step: int) -> dict[str, float]:
        """Return the task's scheduled values at a step."""
        fraction = step / max(1, self.total_steps - 1)
        return {name: knob_value(knob, fraction) for name, knob in self.config.knobs.items()}

    def _decay(self, step: int) -> float:
        end = self.config.weight_decay_end if isinstance(self.config, CosineConfig) else None
        return self.weight_decay if end is None else cosine(self.weight_decay, end, step / max(1, self.total_steps))

    def _one_cycle(self, step: int) -> GroupValues:
        config = self.config
        assert isinstance(config, OneCycleConfig)
        first, last = self.lr / config.div_factor, self.lr / config.div_factor / config.final_div_factor
        peak = config.peak_fraction * self.total_steps - 1
        end = max(self.total_steps - 1, 1)
        if step <= peak:
            fraction = step / peak if peak > 0 else 1.0
            rate = cosine(first, self.lr, fraction)
            momentum = cosine(config.momentum_high, config.momentum_low, fraction)
        else:
            fraction = (step - peak) / max(end - peak, 1e-12)
            rate = cosine(self.lr, last, fraction)
            momentum = cosine(config.momentum_low, config.momentum_high, fraction)
        return GroupValues(rate, self.weight_decay, momentum)
