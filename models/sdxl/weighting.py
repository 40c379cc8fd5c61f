"""Weights of the loss by noise level."""

from typing import Literal

import torch
from torch import Tensor

from models.sdxl.noise import PredictionType

Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased"]


def loss_weight(kind: Weighting, prediction_type: PredictionType, snr: Tensor, gamma: float, floor: float) -> Tensor:
    """Return the weight [B] of each sample's mean squared error from its SNR [B], which for epsilon is above 0.

    A kind is a weight of the error in the latents, and is converted to that of the prediction, so that the loss is the
    same whatever the network predicts. Only `none` weights the prediction itself, by 1.

    min_snr: min(SNR, gamma). Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    soft_min_snr: its smooth form, SNR * gamma / (SNR + gamma). Source: Crowson et al. 2024 (arXiv 2401.11605).
    debiased: sqrt(SNR). Source: Yu et al. 2023 (arXiv 2310.08442). Differs: kohya weights v by 1 / (SNR + 1), and
    OneTrainer by 1 / sqrt(SNR + 1), neither of which is the epsilon loss of that paper.

    floor: the least weight of the error in the latents. All kinds vanish with the SNR, so without a floor the terminal
    timestep of a table with zero terminal SNR trains nothing. Epsilon needs none: its error is weighted by 1 there.
    """
    if kind == "none":
        return torch.ones_like(snr)
    if kind == "min_snr":
        weight = snr.clamp(max=gamma)
    elif kind == "soft_min_snr":
        weight = snr * gamma / (snr + gamma)
    else:
        weight = snr.sqrt()
    if prediction_type == "epsilon":
        return weight / snr
    weight = weight.clamp(min=floor)
    return weight if prediction_type == "sample" else weight / (snr + 1.0)
