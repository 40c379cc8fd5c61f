"""Schedules: pure functions of the step.

`step` counts the updates done so far: the first update uses the value at step 0.
"""

import math
from dataclasses import dataclass
from typing import TypeVar, assert_never

import torch
from torch import Tensor

from optim.config import ConstantConfig, CosineConfig, OneCycleConfig, ScheduleConfig

Number = TypeVar("Number", float, Tensor)

# One cycle, as torch's OneCycleLR has it.
_PEAK_SHARE = 0.3  # share of the run before the peak
_RISE_FACTOR = 25  # the peak's rate over the first
_FALL_FACTOR = 10_000  # the first rate over the last
_HIGH_MOMENTUM = 0.95  # momentum at both ends
_LOW_MOMENTUM = 0.85  # momentum at the peak


def cosine(start: float, end: float, fraction: Number) -> Number:
    """Interpolate from start to end along half a cosine; a tensor fraction returns a tensor."""
    angle = math.pi * _clamp(fraction)
    return end + (start - end) * 0.5 * (1.0 + (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)))


def linear(start: float, end: float, fraction: Number) -> Number:
    """Interpolate linearly from start to end; a tensor fraction returns a tensor."""
    return start + (end - start) * _clamp(fraction)


def _clamp(fraction: Number) -> Number:
    return fraction.clamp(0.0, 1.0) if isinstance(fraction, Tensor) else min(max(fraction, 0.0), 1.0)


@dataclass(frozen=True)
class GroupValues:
    """Values of an update, before a group's scale. momentum: None keeps the configured one."""

    lr: float
    weight_decay: float
    momentum: float | None = None


@dataclass(frozen=True)
class Schedule:
    """The scheduled values of one run.

    The rate follows the official ConvNeXt V2 rule (linear warm-up from 0, half a cosine to min_lr), per step.
    Source: facebookresearch/ConvNeXt-V2:utils.py adjust_learning_rate. Differs: warm-up counts from step + 1, so that
    the first update's rate is not 0.
    """

    config: ScheduleConfig
    lr: float
    weight_decay: float
    total_steps: int
    warmup_steps: int

    def at(self, step: int) -> GroupValues:
        """Return the values of the update that follows `step` updates."""
        match self.config:
            case OneCycleConfig():
                return self._one_cycle(step)
            case ConstantConfig() | CosineConfig() if step < self.warmup_steps:
                return GroupValues(self.lr * (step + 1) / self.warmup_steps, self.weight_decay)
            case ConstantConfig():
                return GroupValues(self.lr, self.weight_decay)
            case CosineConfig():
                steps = max(1, self.total_steps - self.warmup_steps)
                restarts = self.config.restarts
                cycles = (step - self.warmup_steps) * (restarts + 1) / steps
                fraction = cycles - min(int(cycles), restarts)  # the last cycle ends at 1
                return GroupValues(cosine(self.lr, self.config.min_lr, fraction), self.weight_decay)
            case _:
                assert_never(self.config)

    def progress_at(self, step: int) -> float:
        """Return the progress at the update that follows `step` updates: 0 at the first, 1 at the last."""
        return step / max(1, self.total_steps - 1)

    def _one_cycle(self, step: int) -> GroupValues:
        curve = cosine if self.config.curve == "cosine" else linear
        peak = _PEAK_SHARE * self.total_steps - 1
        first = self.lr / _RISE_FACTOR
        if step <= peak:
            fraction = step / peak if peak > 0 else 1.0
            rate = curve(first, self.lr, fraction)
            momentum = curve(_HIGH_MOMENTUM, _LOW_MOMENTUM, fraction)
        else:
            fraction = (step - peak) / (self.total_steps - 1 - peak)
            rate = curve(self.lr, first / _FALL_FACTOR, fraction)
            momentum = curve(_LOW_MOMENTUM, _HIGH_MOMENTUM, fraction)
        return GroupValues(rate, self.weight_decay, momentum if self.config.cycle_momentum else None)


def ema_decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """Return the decay of averages after update number `step`, counted from the start of the averages; before it, 0.

    With warm-up, it is min(decay, (1 + t) / (10 + t)), so that a short run forgets its initial weights. With a constant
    decay of 0.9999, as in published recipes, their share would still be 37 % after 10,000 steps.
    """
    if step < 0:
        return 0.0
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
