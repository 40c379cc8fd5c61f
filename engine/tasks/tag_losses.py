"""Losses of a tagger: one value for each pair of image and tag, in float32.

They are summed over tags, not averaged, so a loss of 20 means 20 nats an image, and published rates fit. Targets may be
soft, anywhere from 0 to 1.
"""

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
_Number = TypeVar("_Number")
_Pair = Annotated[list[_Number], Field(min_length=2, max_length=2)]


class TagLossConfig(Strict):
    """Which loss: the binary cross-entropy, or the asymmetric loss, which reads the others.

    A parameter is a number, or a pair: its values at the start and at the end of the run, with a straight line between.
    """

    name: Literal["bce", "asl"]
    gamma_pos: _Amount | _Pair[_Amount]
    gamma_neg: _Amount | _Pair[_Amount]
    clip: BelowOne | _Pair[BelowOne]


def tag_loss(config: TagLossConfig, logits: Tensor, targets: Tensor, progress: Tensor) -> Tensor:
    """Return the loss of each pair, float32 [B, T]. progress: the share of the run, which parameters may follow."""
    if config.name == "bce":
        return bce(logits.float(), targets)
    values = (config.gamma_pos, config.gamma_neg, config.clip)
    return asymmetric(logits.float(), targets, *(linear(*v, progress) if isinstance(v, list) else v for v in values))


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def asymmetric(
    logits: Tensor, targets: Tensor, gamma_pos: Tensor | float, gamma_neg: Tensor | float, clip: Tensor | float
) -> Tensor:
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


def frequency_weights(counts: Tensor, power: float) -> Tensor:
    """Return a weight for each tag, (median / count) ** power, from 0.1 to 10; counts: [T] of training images."""
    counts = counts.double().clamp(min=1)
    return ((counts.median() / counts) ** power).clamp(0.1, 10).float()
