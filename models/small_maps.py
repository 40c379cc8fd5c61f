"""A convolution that is fast for small maps on a CPU in bfloat16.

oneDNN makes a matrix product for each row of each image, so a convolution takes almost as long for maps of 2 x 2 as of
4 x 4 pixels. Side by side, the images of a batch are one image with long rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS = 32  # for each column of the output; with fewer channels, nothing is gained


class SmallMapConv2d(nn.Conv2d):
    """A convolution whose output has the input's size, divided by the stride and rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W]; for small maps in the channels_last memory format."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):  # first: an export must not ask for sizes
            return super().forward(x)
        batch, channels, height, width = x.shape
        stride = self.stride[1]
        out_width = -(-width // stride)
        if _CHANNELS * out_width > channels or batch == 1:
            return super().forward(x)
        # Zero columns part the images, whose columns then begin at a multiple of the stride.
        step = -(-(width + self.padding[1]) // stride) * stride
        rows = F.pad(x.permute(2, 0, 3, 1), (0, 0, 0, step - width)).reshape(1, height, batch * step, channels)
        columns = super().forward(rows.permute(0, 3, 1, 2))[0].unflatten(2, (batch, -1))  # [C, H, B, W]
        return columns[..., :out_width].permute(2, 0, 1, 3).contiguous(memory_format=torch.channels_last)


def use_small_maps(network: nn.Module) -> None:
    """Make the convolutions of a network fast for small maps; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
            kernel = module.kernel_size[0]
            is_plain = module.kernel_size == (kernel, kernel) and module.dilation == (1, 1)
            if is_plain and kernel > 1 and kernel % 2 and module.padding == (kernel // 2, kernel // 2):
                module.__class__ = SmallMapConv2d
