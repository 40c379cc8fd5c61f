"""Perceptual distances of images, and the discriminator of patches: the losses of an autoencoder.

Images are float32 [B, 3, H, W] in [-1, 1], distances are [B].
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.normalise import Normalise
from models.weights.fit import TimmFamily, is_meta, refuse_misfits
from models.weights.initialise import convert_state
from models.weights.timm_hub import read_timm
from sdxl.config import PerceptualConfig
from utils.errors import UserError, about, close_names
from utils.io.weights import read_weights

_PYRAMID = 4  # levels of the pyramid
_LEVELS = 5  # maps of features at most: VGG's sixth is the pooled fifth


def absolute_error(error: Tensor) -> Tensor:
    """Return the mean absolute value [B] of errors, quadratic below one level of 8 bits.

    Below it, the sign is that of rounding errors: as a gradient, it would make the ranks' order of sums visible.
    """
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=2 / 255).mean(dim=(1, 2, 3))


def pyramid_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean error of gradients and of a Laplacian pyramid: what needs no weight file.

    Each level adds the absolute errors of neighbouring pixels' differences, and of the level less its blurred half.
    """
    error = second - first
    total = torch.zeros(len(first), device=first.device)
    for _ in range(_PYRAMID):
        if min(error.shape[-2:]) < 2:
            break
        half = F.avg_pool2d(error, 2, ceil_mode=True, count_include_pad=False)
        blurred = F.interpolate(half, size=error.shape[-2:], mode="bilinear", align_corners=False)
        parts = error.diff(dim=2), error.diff(dim=3), error - blurred
        total = total + torch.stack([absolute_error(part) for part in parts]).sum(dim=0)
        error = half
    return total


class PerceptualNetwork(nn.Module):
    """The distance of two images in the features of a network, each site's features scaled to length 1.

    Source: Zhang et al. 2018 (arXiv 1801.03924), LPIPS. Without its linear weights, all channels count alike.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        import timm  # takes 0.8 s, so only where it is used

        super().__init__()
        try:
            network = timm.create_model(config.network, num_classes=0) if timm.is_model(config.network) else None
        except RuntimeError:  # an unknown tag
            network = None
        if not hasattr(network, "forward_intermediates") or not isinstance(network.feature_info, list):
            raise UserError(
                f"task.perceptual.network: timm has no network {config.network!r} with maps of features; set "
                f"vgg16.tv_in1k, for example; {close_names(config.network, timm.list_models())}"
            )
        self._config = config
        self.network = network
        stated = network.pretrained_cfg
        self._levels = list(range(min(_LEVELS, len(network.feature_info))))
        self._names = set(network.state_dict())
        network.prune_intermediate_layers(self._levels, prune_head=True)
        self.normalise = Normalise(stated["mean"], stated["std"], 3)
        widths = [network.feature_info[level]["num_chs"] for level in self._levels]
        self.linear = nn.ParameterList(torch.ones(1, width, 1, 1) for width in widths)

    def load(self) -> None:
        """Load the weights; on the meta device, check its files. Raises UserError (`task.perceptual`)."""
        config = self._config
        network = self.network
        kept = network.state_dict()
        if config.lpips is not None:
            with about("task.perceptual.lpips"):
                names = [f"lin{level}.model.1.weight" for level in self._levels]
                found = read_weights(Path(config.lpips))[0]
                refuse_misfits(found, dict(zip(names, self.linear)), config.lpips, "Name LPIPS' file for this network.")
                if not is_meta(network):
                    self.linear.load_state_dict({str(level): found[name] for level, name in enumerate(names)})
        with about("task.perceptual.path"):
            state = (
                convert_state(network, read_weights(Path(config.path))[0])[1] if config.path else read_timm(network)[0]
            )
            unused = (*TimmFamily(network).head_prefixes, "classifier.")
            state = {
                name: tensor
                for name, tensor in state.items()
                if name in kept or not (name in self._names or name.startswith(unused))
            }
            refuse_misfits(state, kept, config.path or config.network, "Name the weights of this network.")
        if not is_meta(network):
            network.load_state_dict(state)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        images = self.normalise((torch.cat([first, second]) + 1) / 2)
        maps = self.network.forward_intermediates(images, indices=self._levels, intermediates_only=True)
        total = torch.zeros(len(first), device=first.device)
        for features, weight in zip(maps, self.linear):
            left, right = F.normalize(features, dim=1, eps=1e-10).chunk(2)
            total = total + ((left - right).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total


class PatchDiscriminator(nn.Sequential):
    """Return logits of patches, [B, 1, h, w]: high for real images.

    Source: Isola et al. 2017 (arXiv 1611.07004), as CompVis/taming-transformers:modules/discriminator/model.py has it.
    Differs: group norm, so that neither the ranks nor the micro-batches change the result.
    """

    def __init__(self) -> None:
        blocks = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for narrow, wide, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            blocks += [nn.Conv2d(narrow, wide, 4, stride, 1, bias=False), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
        super().__init__(*blocks, nn.Conv2d(512, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss [B] from its logits [B, 1, h, w] of real and of decoded images."""
    return (F.relu(1 - real).mean(dim=(1, 2, 3)) + F.relu(1 + fake).mean(dim=(1, 2, 3))) / 2
