"""SDXL's noise levels, and what a network predicts at them: noise, velocity or latents.

Variance preserving: noisy = alpha * latents + sigma * noise with alpha**2 + sigma**2 = 1, and SNR = (alpha / sigma)**2.
Everything is computed from alpha and sigma, so that nothing is infinite where alpha is 0.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils import rng

PredictionType = Literal["epsilon", "v_prediction", "sample"]  # as diffusers names them

TIMESTEP_COUNT = 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012  # of Stable Diffusion, the square roots spaced evenly ("scaled_linear")
TIMESTEP_DRAW, NOISE_DRAW, OFFSET_DRAW = 0, 1, 2  # numbers of utils/rng.py for one sample


class NoiseLevel(NamedTuple):
    """Noise of each sample: alpha [B] and sigma [B], float32. Sigma is positive; alpha is 0 for pure noise."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """Return the ratio of the powers of signal and noise, [B]."""
        return (self.alpha / self.sigma).square()

    def over(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma in a shape that broadcasts over latents [B, ...]."""
        shape = (-1, *[1] * (latents.ndim - 1))
        return self.alpha.view(shape), self.sigma.view(shape)


@dataclass(frozen=True)
class NoiseTable:
    """alphas and sigmas by timestep, float32 [T]; the last alpha is exactly 0 with `zero_terminal_snr`."""

    alphas: Tensor
    sigmas: Tensor
    zero_terminal_snr: bool

    def at(self, timesteps: Tensor, shift: Tensor | None = None) -> NoiseLevel:
        """Return the noise of timesteps [B] (int64); with `shift` [B], sigma / alpha is multiplied by it.

        This moves log SNR by -2 ln(shift). The timestep stays in 0..T-1, and an alpha of 0 stays 0.
        Source: Hoogeboom et al. 2023 (arXiv 2301.11093), "Adjusting noise schedules".
        """
        alpha, sigma = self.alphas[timesteps], self.sigmas[timesteps]
        if shift is None:
            return NoiseLevel(alpha, sigma)
        length = torch.hypot(alpha, shift * sigma)
        return NoiseLevel(alpha / length, shift * sigma / length)


def build_noise_table(zero_terminal_snr: bool) -> NoiseTable:
    """Build SDXL's table of 1000 timesteps; `zero_terminal_snr` moves the last to pure noise and keeps the first.

    Source: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    root_betas = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TIMESTEP_COUNT, dtype=torch.float64)
    alphas = (1.0 - root_betas.square()).cumprod(0).sqrt()
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    return NoiseTable(alphas.float(), (1.0 - alphas.square()).sqrt().float(), zero_terminal_snr)


def resolution_shift(hw: Tensor, base_px: float = 1024) -> Tensor:
    """Return the `shift` [B] of images [B, 2] in pixels: 1 for the area of `base_px` squared, 2 for four times that.

    More pixels average out more noise, so that a larger image needs more for the same coarse content.
    Source: Hoogeboom et al. 2023 (arXiv 2301.11093), "Adjusting noise schedules".
    """
    return hw.float().prod(dim=-1).sqrt() / base_px


def draw_noise(keys: Tensor, latents: Tensor, offset: float) -> Tensor:
    """Return standard normal noise of the latents' shape, float32, from keys [B] (a batch's `key`).

    offset: strength of a normal number per sample and channel that is added; 0 is off. It trains brightness where the
    terminal SNR is above 0; the SDXL base model had 0.0357.
    """
    noise = rng.normal(keys, latents.shape[1:], NOISE_DRAW)
    if offset:
        noise = noise + offset * rng.normal(keys, (latents.shape[1], 1, 1), OFFSET_DRAW)
    return noise


def add_noise(latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Return the noisy latents [B, C, H, W], float32."""
    alpha, sigma = level.over(latents)
    return alpha * latents + sigma * noise


def target(prediction_type: PredictionType, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Return what the network is to predict, [B, C, H, W].

    Source: Salimans, Ho 2022 (arXiv 2202.00512), section 4 and appendix D: v = alpha * noise - sigma * latents.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    alpha, sigma = level.over(latents)
    return alpha * noise - sigma * latents


def to_latents(prediction_type: PredictionType, output: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """Return the latents that follow from a network's output; of epsilon, only where alpha is above 0."""
    if prediction_type == "sample":
        return output
    alpha, sigma = level.over(noisy)
    if prediction_type == "epsilon":
        return (noisy - sigma * output) / alpha
    return alpha * noisy - sigma * output


def to_noise(prediction_type: PredictionType, output: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """Return the noise that follows from a network's output."""
    if prediction_type == "epsilon":
        return output
    alpha, sigma = level.over(noisy)
    if prediction_type == "sample":
        return (noisy - alpha * output) / sigma
    return sigma * noisy + alpha * output
