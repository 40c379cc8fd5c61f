"""Losses of a tagger: one value for each pair of image and tag, in float32.

They are summed over tags, not averaged, so a loss of 20 means 20 nats an image, and published rates fit. Targets may be
soft, anywhere from 0 to 1.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from optim.schedules import linear
from utils.config.bounds import BelowOne
from utils.config.schema import Strict

_EPS = 1e-8  # as the published code of the asymmetric loss has it
_Amount = Annotated[float, Field(ge=0, le=100)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Number = TypeVar("_Number")
_Pair = Annotated[list[_Number], Field(min_length=2, max_length=2)]


class TagLossConfig(Strict):
    """Which loss, and its parameters; of `name`, only those of its formula are read.

    A parameter is a number, or a pair: its values at the start and at the end of the run, with a straight line between.
    """

    name: Literal["bce", "asl", "focal", "hill"]
    gamma_pos: _Amount | _Pair[_Amount]
    gamma_neg: _Amount | _Pair[_Amount]
    clip: BelowOne | _Pair[BelowOne]
    alpha: _Probability | _Pair[_Probability] | None
    margin: _Amount | _Pair[_Amount]


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


class TagLoss:
    """The configured loss."""

    def __init__(self, config: TagLossConfig) -> None:
        self._formula = LOSSES[config.name]
        read = list(inspect.signature(self._formula).parameters)[2:]  # beside logits and targets
        self._parameters = {name: getattr(config, name) for name in read}

    def __call__(self, logits: Tensor, targets: Tensor, progress: Tensor) -> Tensor:
        """Return the loss of each pair, float32 [B, T]. progress: the share of the run, which parameters may follow."""
        values = {
            name: linear(*value, progress) if isinstance(value, list) else value
            for name, value in self._parameters.items()
        }
        return self._formula(logits.float(), targets, **values)


def frequency_weights(counts: Tensor, power: float) -> Tensor:
    """Return a weight for each tag, (median / count) ** power, from 0.1 to 10; counts: [T] of training images."""
    counts = counts.double().clamp(min=1)
    return ((counts.median() / counts) ** power).clamp(0.1, 10).float()
