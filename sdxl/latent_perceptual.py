"""The latent perceptual loss: the distance of predicted and true latents in the features of the VAE's decoder.

Source: Berrada et al. 2024 (arXiv 2411.04873), section 3; their program in huggingface/diffusers:
examples/research_projects/lpl/lpl_loss.py, with shared norms and power law.
Differs: outliers are values beyond four standard deviations, in all features; in the paper, beyond quantiles.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_OUTLIER = 4.0  # standard deviations of a channel
_LEAST_NORM = 0.1  # of a position, as a share of the image's mean


def decoder_features(vae: nn.Module, z: Tensor) -> list[Tensor]:
    """Return the outputs of the decoder's middle block and up blocks, float32, for the VAE's outputs z [B, 4, h, w].

    Blocks are computed again in the backward pass, because activations at full resolution are large.
    """
    hidden = vae.decoder.conv_in(vae.post_quant_conv(z.to(vae.dtype)))
    features = []
    for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
        hidden = checkpoint(block, hidden, use_reentrant=False) if hidden.requires_grad else block(hidden)
        features.append(hidden.float())
    return features


@torch.compiler.disable  # the number of samples changes with each batch
def perceptual_loss(vae: nn.Module, predicted: Tensor, true: Tensor) -> Tensor:
    """Return the loss of each sample [B] from the VAE's outputs [B, 4, h, w], in the VAE's own dtype.

    Features are divided by the norm of the true ones over channels; a feature of r times the resolution counts 1 / r.
    """
    with torch.autocast(true.device.type, enabled=False):
        with torch.no_grad():
            targets = decoder_features(vae, true)
        losses = []
        for number, (x, y) in enumerate(zip(decoder_features(vae, predicted), targets)):
            std, mean = torch.std_mean(y, dim=(2, 3), correction=0, keepdim=True)
            kept = (y - mean).abs() <= _OUTLIER * std
            norm = (y * kept).norm(dim=1, keepdim=True)
            norm = torch.maximum(norm, _LEAST_NORM * norm.mean(dim=(2, 3), keepdim=True))
            squared = torch.where(kept, (x - y) / norm, 0.0).square().sum(dim=(2, 3))
            losses.append((squared / kept.sum(dim=(2, 3))).mean(dim=1) / 2 ** min(number, 3))
        return torch.stack(losses).mean(dim=0)
