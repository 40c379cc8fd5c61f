"""The parts of SDXL's training step: latents, texts, noise and its levels, targets, and weights of the loss.

noisy = alpha * latents + sigma * noise, and SNR = (alpha / sigma)**2. With epsilon and v, alpha**2 + sigma**2 = 1; with
flow, alpha + sigma = 1, and sigma is the time. Everything is computed from alpha and sigma, so that nothing is infinite
if alpha is 0. Random numbers come from each sample's key, so they do not depend on how a batch is split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdxl.config import TIMESTEP_COUNT, LossConfig, PredictionType, TimestepSampling, Weighting
from sdxl.files.family import SCHEDULE
from sdxl.files.tokenizer import BOS, EOT, pad_second, tokenize
from sdxl.vae import latent_scale
from utils import rng

# Numbers of utils/rng.py for one sample.
TIMESTEP_DRAW = 0
NOISE_DRAW = 1
OFFSET_DRAW = 2
LATENT_DRAW = 3
CLASS_DRAW = 4
PERTURBATION_DRAW = 5
COARSE_DRAW = 6
RATIO_DRAW = 7

# ----------------------------------------------------------------------------------------------------- images and texts


def to_levels(images: Tensor) -> Tensor:
    """Return uint8 images as what a VAE takes, float32 from -1 to 1."""
    return images.float() / 127.5 - 1.0


def to_bytes(levels: Tensor) -> Tensor:
    """Return images of a VAE, from about -1 to 1, as uint8."""
    return ((levels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents, float32 [B, 4, H / 8, W / 8], for images uint8 [B, 3, H, W].

    The VAE computes in its own dtype, because SDXL's VAE overflows in float16.
    """
    with torch.autocast(images.device.type, enabled=False):
        latents = vae.encode(to_levels(images).to(vae.dtype)).latent_dist
    return latents.mean.float(), latents.logvar.float()


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents [B, 4, h, w] to images, uint8 [B, 3, H, W], in the VAE's own dtype."""
    return to_bytes(decode_to_levels(vae, latents))


def decode_to_levels(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents [B, 4, h, w] to images from about -1 to 1, float32 [B, 3, H, W]."""
    mean, factor = (part.to(latents.device) for part in latent_scale(vae))
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents.float() / factor + mean).to(vae.dtype)).sample.float()


def encode_text(
    text_encoder: nn.Module, text_encoder_2: nn.Module, ids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode the ids of `tokenize`, int64 [B, chunks, 77], with weights of `tokenize`.

    Return prompt_embeds [B, 77 * chunks, 768 + 1280], the outputs of the penultimate layers without the final norm,
    chunk after chunk, and pooled_prompt_embeds [B, 1280], the second encoder's projected EOT of the first chunk.
    Chunks without a token are zero, except for the first one.
    A weight w moves a token's output z to z0 + w (z - z0), where z0 is the output at its place in the empty text; the
    pooled output has no weights. Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1, and, for weights,
    comfyanonymous/ComfyUI:comfy/sd1_clip.py, ClipTokenWeightEncoder.
    """
    flat = ids.flatten(0, 1)
    if weights is not None:
        empty_ids = torch.full_like(flat[:1], EOT)
        empty_ids[:, 0] = BOS
        flat = torch.cat([flat, empty_ids])
    first = text_encoder(flat, output_hidden_states=True)
    second = text_encoder_2(pad_second(flat), output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    if weights is not None:
        empty = embeds[-1]
        embeds = embeds[:-1]
        weights = weights.flatten(0, 1)[..., None]
        moved = (empty + weights * (embeds - empty)).to(embeds.dtype)
        embeds = torch.where(weights == 1, embeds, moved)
    is_empty = ids[..., 1] == EOT
    is_empty[:, 0] = False
    embeds = embeds.masked_fill(is_empty.flatten()[:, None, None], 0)
    return embeds.reshape(len(ids), -1, embeds.shape[-1]), second.text_embeds[: ids.shape[:2].numel() : ids.shape[1]]


def encode_captions(
    encoders: Sequence[nn.Module], captions: Sequence[str], chunks: int, *, emphasis: bool
) -> tuple[Tensor, Tensor]:
    """Encode captions on the encoders' device, as `encode_text`. emphasis: as for `tokenize`."""
    ids, weights = tokenize(captions, chunks, emphasis=emphasis)
    device = encoders[0].device
    return encode_text(*encoders, ids.to(device), None if weights is None else weights.to(device))


# ---------------------------------------------------------------------------------------------------------------- noise


class NoiseLevel(NamedTuple):
    """The noise level of each sample or timestep: alpha and sigma, float32 [B]. Sigma is above 0; alpha may be 0."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """Return the signal-to-noise ratio, [B]."""
        return (self.alpha / self.sigma).square()

    def at(self, timesteps: Tensor) -> "NoiseLevel":
        """Return the noise levels at timesteps [B] (int64)."""
        return NoiseLevel(self.alpha[timesteps], self.sigma[timesteps])

    def over(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma in a shape that broadcasts over latents [B, ...]."""
        shape = (-1, *[1] * (latents.ndim - 1))
        return self.alpha.view(shape), self.sigma.view(shape)


def build_noise_table(zero_terminal_snr: bool) -> NoiseLevel:
    """Return SDXL's noise schedule of 1000 timesteps; `zero_terminal_snr` makes the last pure noise, keeping the first.

    Source: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    first, last = SCHEDULE["beta_start"], SCHEDULE["beta_end"]
    root_betas = torch.linspace(first**0.5, last**0.5, TIMESTEP_COUNT, dtype=torch.float64)
    alphas = (1.0 - root_betas.square()).cumprod(0).sqrt()
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    return NoiseLevel(alphas.float(), (1.0 - alphas.square()).sqrt().float())


def draw_times(kind: TimestepSampling, keys: Tensor, strata: Tensor | None = None, *, shift: float = 1.0) -> Tensor:
    """Return times from 0, the image, to below 1, noise, float32 [B], from keys [B] (a batch's `key`) on their device.

    logit_normal: the sigmoid of a standard normal number.
    stratified: uniform within one of n equal parts of the range, so that a step with one sample per part covers all of
    it. strata: int64 [B, 2], the part 0..n-1 and n, such as a sample's position in the global batch and its size.
    shift: see `shift_times`; 1 is off.
    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1, for logit_normal; Kingma et al. 2021 (arXiv 2107.00630),
    "low-discrepancy sampler", for strata. Differs: they shift evenly spaced times by one random number.
    """
    if kind == "logit_normal":
        time = torch.sigmoid(rng.normal(keys, (), TIMESTEP_DRAW))
    else:
        time = rng.uniform(keys, (), TIMESTEP_DRAW)
    if kind == "stratified":
        part, parts = strata.unbind(dim=1)
        time = (part + time) / parts
    return shift_times(time, shift).clamp(max=1 - 2**-24)  # a time may round up to 1


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Return times in 0..1 moved towards noise: as levels of flow, sigma / alpha is multiplied by `shift`.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
    """
    return shift * times / (1 + (shift - 1) * times)


def find_levels(prediction_type: PredictionType, times: Tensor, table: NoiseLevel) -> tuple[NoiseLevel, Tensor]:
    """Return the noise levels at times [B] of `draw_times`, and the U-Net's timesteps [B], from 0 to below 1000.

    table: of epsilon and v. With flow, a timestep is the noise level x 1000, as for diffusers' flow schedulers and
    comfyanonymous/ComfyUI:comfy/model_sampling.py, ModelSamplingDiscreteFlow.
    """
    timesteps = times * TIMESTEP_COUNT
    if prediction_type == "flow":
        return NoiseLevel(1 - times, times), timesteps
    return table.at(timesteps.long()), timesteps.long()


def add_noise(latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Return the noisy latents [B, C, H, W], float32."""
    alpha, sigma = level.over(latents)
    return alpha * latents + sigma * noise


def add_coarse_noise(noise: Tensor, keys: Tensor, iterations: int, discount: float) -> Tensor:
    """Return noise [B, C, H, W] with larger and larger grains, at a deviation of 1.

    Of more noise of level n, from 0, a corner r**n times smaller, with r from 2 to 4, is stretched to the whole, and
    counts discount**n. No level follows one with a side of 1.
    Source: kohya-ss/sd-scripts:library/custom_train_functions.py, pyramid_noise_like. Differs: r and the deviation are
    of each sample, so that they do not depend on its batch, and are drawn on its device.
    """
    coarse = rng.normal(keys, (iterations, *noise.shape[1:]), COARSE_DRAW)
    levels = torch.arange(iterations, device=noise.device)
    smaller = (2 + 2 * rng.uniform(keys, (iterations,), RATIO_DRAW)) ** levels
    corners = [(side / smaller).floor().clamp(min=1) for side in noise.shape[2:]]
    goes_on = functional.pad((torch.minimum(*corners) > 1).float(), (1, -1), value=1.0).cumprod(1)
    rows, columns = map(_stretch, corners, noise.shape[2:])
    with torch.autocast(noise.device.type, enabled=False):
        parts = (rows, coarse, columns, goes_on * discount**levels)
        noise = noise + torch.einsum("bnyi,bncij,bnxj,bn->bcyx", *parts)
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def _stretch(corner: Tensor, side: int) -> Tensor:
    """Return weights [..., side, side] of the first `corner` [...] pixels that are stretched to a side, bilinearly."""
    pixels = torch.arange(side, device=corner.device)
    corner = corner[..., None]
    places = ((pixels + 0.5) * corner / side - 0.5).clamp(min=0).minimum(corner - 1)
    return (1 - (places[..., None] - pixels).abs()).clamp(min=0)


def target(prediction_type: PredictionType, latents: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Return what the network is to predict, [B, C, H, W].

    Source: Salimans, Ho 2022 (arXiv 2202.00512), section 4 and appendix D: v = alpha * noise - sigma * latents;
    Liu et al. 2022 (arXiv 2209.03003), equation 1: flow, the velocity from the latents to the noise.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow":
        return noise - latents
    alpha, sigma = level.over(latents)
    return alpha * noise - sigma * latents


def measure_errors(loss: LossConfig, pred: Tensor, wanted: Tensor, level: NoiseLevel, timesteps: Tensor) -> Tensor:
    """Return the error of a prediction at each place, [B, C, H, W].

    huber is 2 c (sqrt(d^2 + c^2) - c) of a difference d, and smooth_l1 the same divided by c. c falls from 1
    to `huber_c`, with the timestep (exponential) or the SNR (snr), or is constant; snr has no `huber_scale`.
    Source: kohya-ss/sd-scripts:library/train_util.py, conditional_loss and get_huber_threshold_if_needed.
    """
    difference = pred - wanted
    if loss.kind in ("l1", "l2"):
        return difference.abs() if loss.kind == "l1" else difference.square()
    c = torch.full_like(level.alpha, loss.huber_c)
    if loss.huber_schedule == "exponential":
        c = c ** (timesteps / TIMESTEP_COUNT)
    if loss.huber_schedule == "snr":
        c = c + (1 - c) * (level.alpha / (level.alpha + level.sigma)).square()
    else:
        c = c * loss.huber_scale
    c = c.view(-1, 1, 1, 1)
    return 2 * ((difference.square() + c.square()).sqrt() - c) * (c if loss.kind == "huber" else 1)


def loss_weight(kind: Weighting, prediction_type: PredictionType, snr: Tensor, gamma: float, floor: float) -> Tensor:
    """Return the weight [B] of each sample's mean squared error from its SNR [B] (above 0 for epsilon).

    Each kind weights the error in the latents. It is converted to a weight for the prediction's error, so the loss does
    not depend on the prediction type. Only `none` weights the prediction's own error, by 1; flow has no other kind.

    min_snr: min(SNR, gamma). Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    soft_min_snr: its smooth form, SNR * gamma / (SNR + gamma). Source: Crowson et al. 2024 (arXiv 2401.11605).
    debiased: sqrt(SNR), with SNR at most 1000. Source: Yu et al. 2023 (arXiv 2310.08442). Differs: kohya weights v by
    1 / (SNR + 1), and OneTrainer by 1 / sqrt(SNR + 1); neither equals the epsilon loss of the paper.

    as_noise: 1 on the error of the noise that a prediction of v implies, with SNR at most 1000.
    Source: kohya-ss/sd-scripts:library/custom_train_functions.py, scale_v_prediction_loss_like_noise_prediction.

    floor: the least weight of the error in the latents. All kinds vanish with the SNR, so without a floor a last
    timestep with zero SNR trains nothing. Epsilon needs no floor, because its error has weight 1 there.
    """
    if kind == "none" or (kind, prediction_type) == ("as_noise", "epsilon"):
        return torch.ones_like(snr)
    if kind in ("as_noise", "debiased"):
        snr = snr.clamp(max=1000)
    if kind == "as_noise":
        return snr / (snr + 1)
    if kind == "min_snr":
        weight = snr.clamp(max=gamma)
    elif kind == "soft_min_snr":
        weight = snr * gamma / (snr + gamma)
    else:
        weight = snr.sqrt()
    if prediction_type == "epsilon":
        return weight / snr
    return weight.clamp(min=floor) / (snr + 1.0)
