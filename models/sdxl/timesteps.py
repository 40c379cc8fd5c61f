"""Timesteps of training, drawn from each sample's key: the same however a batch is split."""

from typing import Literal

import torch
from torch import Tensor

from models.sdxl.noise import TIMESTEP_COUNT, TIMESTEP_DRAW
from utils import rng

TimestepSampling = Literal["uniform", "logit_normal", "stratified"]


def draw_timesteps(
    kind: TimestepSampling,
    keys: Tensor,
    strata: Tensor | None = None,
    *,
    count: int = TIMESTEP_COUNT,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Return timesteps in 0..count-1, int64 [B], from keys [B] (a batch's `key`) on their device.

    logit_normal: the sigmoid of a normal number of `mean` and `std`; a positive mean prefers noise.
    stratified: uniform within one of n equal parts of the range, so that a step whose samples have a part each covers
    all of it. strata: int64 [B, 2], the part 0..n-1 and n, such as a sample's place in the global batch and its size.
    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1, for logit_normal; Kingma et al. 2021 (arXiv 2107.00630),
    "low-discrepancy sampler", for strata. Differs: they shift one set of even places by one random number.
    """
    if kind == "logit_normal":
        place = torch.sigmoid(mean + std * rng.normal(keys, (), TIMESTEP_DRAW))
    else:
        place = rng.uniform(keys, (), TIMESTEP_DRAW)
    if kind == "stratified":
        part, parts = strata.unbind(dim=1)
        place = (part + place) / parts
    return (place * count).long().clamp(max=count - 1)  # rounding may make 1 of a number just below it
