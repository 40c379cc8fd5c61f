"""Losses of tags, and the bias with which a head predicts their frequencies."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from engine.tasks.config import TagLossConfig

_LOWEST_BIAS = -8.0  # bias; the logit of a tag without training images is -infinity
_EPS = 1e-8  # from the published code of the asymmetric loss


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def tag_loss(config: TagLossConfig, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss per sample and tag, float32 [B, T]: the cross-entropy, the focal or the asymmetric loss.

    The focal loss follows Lin et al. 2017 (arXiv 1708.02002), equation 5.
    The focusing weights of the asymmetric loss get no gradient, as in the published training.
    Source: Ridnik et al. 2021 (arXiv 2009.14119), equations 4 to 7; Alibaba-MIIL/ASL:src/loss_functions/losses.py.
    Differs: gamma+ is 0, its published value; log p is exact even for a positive with p < 1e-8, which therefore keeps
    its gradient.
    """
    logits = logits.float()
    if config.name == "bce":
        return bce(logits, targets)
    if config.name == "focal":
        return sigmoid_focal_loss(logits, targets, config.alpha, config.gamma)
    absent = ((-logits).sigmoid() + config.clip).clamp(max=1)  # 1 - p_m
    log_likelihood = targets * F.logsigmoid(logits) + (1 - targets) * absent.clamp(min=_EPS).log()
    with torch.no_grad():
        prob = logits.sigmoid() * targets + absent * (1 - targets)  # of the target
        weight = (1 - prob) ** (config.gamma_neg * (1 - targets))
    return -log_likelihood * weight


def prior_bias(priors: Tensor) -> Tensor:
    """Return biases with which an untrained head predicts the frequencies of tags. priors: shares of images [T]."""
    return priors.logit(eps=1e-6).clamp(_LOWEST_BIAS, 0.0)
