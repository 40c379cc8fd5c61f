"""ConvNeXt V2 for any number of channels, any image shape and 2 to 5 stages.

Parameters have the published names. The sizes are in conf/model/convnextv2_*.yaml, and models/build.py builds the
network. models/sparse.py computes some sites of an image alone.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.depthwise import DepthwiseConv2d
from models.layers import GRN, ChannelsFirstLayerNorm, DropPath, LayerNorm, Sites

_GROUP_LAST = 12  # the last layer for layer decay of kind `group`


def init_weights(module: nn.Module) -> None:
    """Draw the weights of a convolution or linear layer (std .02) and zero its bias; for `module.apply`.

    Differs: the published code draws a truncated normal with bounds 100 standard deviations away. torch's truncated
    normal changes between releases, while its plain normal does not.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Mix space by a depthwise 7x7 convolution, then channels by an MLP with GRN, and add the input.

    Source: Woo et al. 2023 (arXiv 2301.00808), figure 5; facebookresearch/ConvNeXt-V2:models/convnextv2.py.
    """

    def __init__(self, dim: int, drop_path_rate: float) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, sites: Sites | None = None) -> Tensor:
        """Return a map [B, C, H, W] from one; with `sites`, tokens [B, V, r, r, C] of these sites from such tokens."""
        if sites is None:
            branch = self.dwconv(x).permute(0, 2, 3, 1)  # channels last: [B, H, W, C]
        else:  # GRN takes its norm over dimensions 1 and 2, which have only the visible sites
            branch = sites.from_map(self.dwconv(sites.to_map(x))).view(sites.batch, -1, 1, x.shape[-1])
        branch = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(branch)))))
        return self.drop_path(x, branch.permute(0, 3, 1, 2) if sites is None else branch.view(x.shape))


class ConvNeXtV2(nn.Module):
    """Classify images, or compute the last feature map for FCMAE.

    The kernel of the stem equals its stride (2x2 or 4x4 pixels). Stochastic depth grows linearly from 0 at the first
    block to `drop_path_rate` at the last. Weights start normal with std .02 (`init_weights`), biases start at 0,
    and the head is scaled by `head_init_scale`. With `num_classes` 0 there is no head and no final norm.

    Source: Woo et al. 2023 (arXiv 2301.00808); facebookresearch/ConvNeXt-V2:models/convnextv2.py.
    Differs: 2 to 5 stages, and stem stride 2.
    """

    # The weights that read the images, and prefixes of weights that a file may lack: the head and the final norm.
    first_convolutions = ("downsample_layers.0.0.weight",)
    head_prefixes = ("head.",)
    norm_prefixes = ("norm.",)

    def __init__(
        self,
        *,
        in_channels: int,
        depths: Sequence[int],
        dims: Sequence[int],
        stem_stride: int,
        drop_path_rate: float,
        head_init_scale: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.depths = tuple(depths)
        self.num_features = dims[-1]  # channels of the last feature map
        self.total_stride = stem_stride * 2 ** (len(dims) - 1)  # pixels per side of a site in the last feature map
        self.grad_checkpointing = False

        stem = nn.Conv2d(in_channels, dims[0], kernel_size=stem_stride, stride=stem_stride)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, ChannelsFirstLayerNorm(dims[0], eps=1e-6))])
        for before, after in zip(dims[:-1], dims[1:]):
            halve = nn.Conv2d(before, after, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelsFirstLayerNorm(before, eps=1e-6), halve))

        # Plain numbers: the values of a tensor could not be read on the meta device.
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * index / last for index in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(dim, next(rates)) for _ in range(depth)]) for depth, dim in zip(depths, dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6) if num_classes > 0 else nn.Identity()
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_weights)
        if num_classes > 0:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K], or without a head the mean over sites [B, C_last], without the final norm.

        images: float [B, C, H, W]. Pixels beyond a multiple of `total_stride` are ignored.
        """
        return self.forward_head(self.forward_features(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature map, or with `pre_logits` the head's input [B, C_last] (timm's names)."""
        # The gradient then is channels_last in memory, as the blocks' maps are.
        pooled = self.norm(features.permute(0, 2, 3, 1).mean(dim=(1, 2)))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the head (timm's name)."""
        return self.head

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map [B, C_last, h, w] of images [B, C, H, W]."""
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = self.run_stage(stage, downsample(x))
        return x

    def last_layer(self, kind: str) -> int:
        """Return the highest layer below the head for layer decay: the number of blocks, or 12 for `group`."""
        return _GROUP_LAST if kind == "group" else sum(self.depths)

    def layer_of(self, name: str, kind: str) -> int:
        """Return the layer of a parameter for layer decay; head and final norm are in layer `last_layer` + 1.

        kind: `single` numbers each block, `group` uses twelve groups, `timm` is `single` with the stem one layer lower.
        Source: facebookresearch/ConvNeXt-V2:optim_factory.py (`single`, `group`);
        huggingface/pytorch-image-models:timm/models/convnext.py group_matcher (`timm`).
        """
        if match := re.match(r"downsample_layers\.(\d+)\.", name):
            stage = int(match[1])
            if stage == 0:
                return 1 if kind == "single" else 0
            if kind == "group":
                return stage + 1 if stage < len(self.depths) - 1 else _GROUP_LAST
            return sum(self.depths[:stage]) + 1
        if match := re.match(r"stages\.(\d+)\.(\d+)\.", name):
            stage, block = map(int, match.groups())
            if kind != "group":
                return sum(self.depths[:stage]) + block + 1
            if stage == len(self.depths) - 1:
                return _GROUP_LAST
            return stage + 1 if stage < 2 else min(3 + block // 3, _GROUP_LAST - 1)
        return self.last_layer(kind) + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let blocks keep only their input and recompute the rest in the backward pass (timm's name)."""
        self.grad_checkpointing = enable

    def run_stage(self, stage: nn.Sequential, x: Tensor, sites: Sites | None = None) -> Tensor:
        """Apply the blocks of a stage, with gradient checkpointing if it is set."""
        for block in stage:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, sites, use_reentrant=False)
            else:
                x = block(x, sites)
        return x
