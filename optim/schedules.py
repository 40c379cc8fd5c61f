"""Schedules: pure functions of the step.

`step` counts the updates done so far: the first update uses the value at step 0.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from optim.config import ConstantConfig, CosineConfig, OneCycleConfig, ScheduleConfig

Number = TypeVar("Number", float, Tensor)


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
                rate = self.lr * (step + 1) / self.warmup_steps
                return GroupValues(rate, self._decay(step))
            case ConstantConfig():
                return GroupValues(self.lr, self.weight_decay)
            case CosineConfig():
                steps, restarts = max(1, self.total_steps - self.warmup_steps), self.config.restarts
                cycles = (step - self.warmup_steps) * (restarts + 1) / steps
                fraction = cycles - min(int(cycles), restarts)  # the last cycle ends at 1
                return GroupValues(cosine(self.lr, self.config.min_lr, fraction), self._decay(step))

    def progress_at(self, step: int) -> float:
        """Return the progress at the update that follows `step` updates: 0 at the first, 1 at the last."""
        return step / max(1, self.total_steps - 1)

    def _decay(self, step: int) -> float:
        end = self.config.weight_decay_end if isinstance(self.config, CosineConfig) else None
        return self.weight_decay if end is None else cosine(self.weight_decay, end, step / max(1, self.total_steps))

    def _one_cycle(self, step: int) -> GroupValues:
        config, last_step = self.config, self.total_steps - 1
        first, last = self.lr / config.div_factor, self.lr / config.div_factor / config.final_div_factor
        low, high, peak = config.momentum_low, config.momentum_high, config.peak_fraction * self.total_steps - 1
        phases = [(peak, (first, self.lr), (high, low))]  # last step, (first, last) rate, (first, last) momentum
        if config.three_phase:
            phases += [(2 * peak, (self.lr, first), (low, high)), (last_step, (first, last), (high, high))]
        else:
            phases.append((last_step, (self.lr, last), (low, high)))
        curve, start = cosine if config.curve == "cosine" else linear, 0.0
        for end, rates, momenta in phases:
            if step <= end or end == last_step:
                fraction = (step - start) / (end - start) if end > start else 1.0
                momentum = curve(*momenta, fraction) if config.cycle_momentum else None
                return GroupValues(curve(*rates, fraction), self.weight_decay, momentum)
            start = end
        raise AssertionError("the last phase ends with the run")
