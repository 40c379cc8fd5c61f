"""Losses of a tagger: one value for each pair of image and tag, in float32.

They are summed over tags, not averaged, so a loss of 20 means 20 nats an image, and published rates fit. Targets may be
soft, anywhere from 0 to 1.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from utils.config.schema import Strict

_EPS = 1e-8  # as the published code of the asymmetric loss has it


class TagLossConfig(Strict):
    """Which loss, and its parameters; of `name`, only those of its formula are read.

    scheduled: parameters that schedule.knobs gives in place of the values here, such as [gamma_neg, clip].
    """

    name: Literal["bce", "asl", "focal", "hill"]
    gamma_pos: Annotated[float, Field(ge=0, le=100)]
    gamma_neg: Annotated[float, Field(ge=0, le=100)]
    clip: Annotated[float, Field(ge=0, lt=1)]
    alpha: Annotated[float, Field(ge=0, le=1)] | None
    margin: Annotated[float, Field(ge=0, le=100)]
    scheduled: list[Literal["gamma_pos", "gamma_neg", "clip", "alpha", "margin"]]

    @model_validator(mode="after")
    def _reads_what_is_scheduled(self) -> Self:
        read = parameters_of(self.name)
        for name in self.scheduled:
            if name not in read:
                raise ValueError(
                    f"task.loss.scheduled: {name} is not read by task.loss.name={self.name}, which reads "
                    f"{', '.join(read) or 'none'}; remove it"
                )
        return self


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def asymmetric(logits: Tensor, targets: Tensor, *, gamma_pos: Tensor, gamma_neg: Tensor, clip: Tensor) -> Tensor:
    """Return the asymmetric loss; its focusing weights get no gradient, as in the published training.

    Source: Ridnik et al. 2021 (arXiv 2009.14119), equations 4 to 7; Alibaba-MIIL/ASL:src/loss_functions/losses.py.
    Differs: log p is exact for a positive of p < 1e-8 too, which so keeps its gradient.
    """
    absent = ((-logits).sigmoid() + clip).clamp(max=1)  # 1 - p_m
    log_likelihood = targets * F.logsigmoid(logits) + (1 - targets) * absent.clamp(min=_EPS).log()
    with torch.no_grad():
        right = logits.sigmoid() * targets + absent * (1 - targets)
        weight = (1 - right) ** (gamma_pos * targets + gamma_neg * (1 - targets))
    return -log_likelihood * weight


def focal(logits: Tensor, targets: Tensor, *, gamma_pos: Tensor, alpha: Tensor | None) -> Tensor:
    """Return the focal loss; alpha None: without balance.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5; its gamma is `gamma_pos`.
    """
    wrong = _focus((-logits).sigmoid() * targets + logits.sigmoid() * (1 - targets), gamma_pos)
    loss = bce(logits, targets) * wrong
    return loss if alpha is None else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def hill(logits: Tensor, targets: Tensor, *, gamma_pos: Tensor, margin: Tensor) -> Tensor:
    """Return the Hill loss, for tags that are often missing: a negative of high probability costs little.

    Source: Zhang et al. 2021 (arXiv 2112.07368), with lambda 1.5; xinyu1205/robust-loss-mlml, where gamma is 2:
    src/loss_functions/losses.py.
    """
    probs, below = logits.sigmoid(), margin - logits
    positive = F.softplus(below) * _focus(below.sigmoid(), gamma_pos)
    return targets * positive + (1 - targets) * (1.5 - probs) * probs**2


def _focus(wrong: Tensor, gamma: Tensor) -> Tensor:
    """Return wrong ** gamma, whose slope is finite for a gamma below 1 too."""
    return wrong.clamp(min=_EPS) ** gamma


LOSSES: dict[str, Callable[..., Tensor]] = {"bce": bce, "asl": asymmetric, "focal": focal, "hill": hill}


def parameters_of(name: str) -> list[str]:
    """Return the parameters that a loss reads: what its formula takes beside logits and targets."""
    return list(inspect.signature(LOSSES[name]).parameters)[2:]


class TagLoss:
    """The configured loss."""

    def __init__(self, config: TagLossConfig) -> None:
        self._formula, self.scheduled = LOSSES[config.name], frozenset(config.scheduled)
        read = parameters_of(config.name)
        self._fixed = {name: getattr(config, name) for name in read if name not in self.scheduled}

    def __call__(self, logits: Tensor, targets: Tensor, knobs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair, float32 [B, T]; knobs: the scheduled parameters."""
        given = {name: knobs[name] for name in self.scheduled}
        return self._formula(logits.float(), targets, **self._fixed, **given)


def frequency_weights(counts: Tensor, power: float) -> Tensor:
    """Return a weight for each tag, (median / count) ** power, from 0.1 to 10; counts: [T] of training images."""
    counts = counts.double().clamp(min=1)
    return ((counts.median() / counts) ** power).clamp(0.1, 10).float()
