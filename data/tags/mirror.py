"""Mirror images of a batch together with their tags, on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import rng

_COIN_DRAW = 0xF11B  # of utils/rng.py; tasks use small numbers


class Mirror(nn.Module):
    """Mirror half of the images, by their keys, and exchange the tags that a mirror exchanges.

    orientation: the facts of data/tags/orientation.py, for `width` outputs. Its tensors follow from the facts, so they
    are in no state dict.
    """

    def __init__(self, orientation: Mapping[str, Any], width: int) -> None:
        super().__init__()
        permutation = torch.arange(width)
        pairs = torch.tensor(orientation["pairs"], dtype=torch.long).view(-1, 2)
        permutation[pairs] = pairs.flip(1)
        dropped = torch.zeros(width, dtype=torch.bool)
        dropped[orientation["dropped"]] = True
        no_flip = torch.tensor(orientation["no_flip"], dtype=torch.long)
        for name, tensor in (("permutation", permutation), ("dropped", dropped), ("no_flip", no_flip)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, flip: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and targets [B, T], mirrored where it is due; without a host synchronisation.

        flip: int8 [B], -1 never, 1 always, 0 (or None) by a coin of the key [B], and never with a tag of `no_flip`.
        """
        coin = rng.uniform(keys, (), _COIN_DRAW) < 0.5
        mirrored = coin & ~(targets.index_select(1, self.no_flip) > 0.5).any(dim=1)
        if flip is not None:
            mirrored = torch.where(flip == 0, mirrored, flip > 0)
        turned = targets.index_select(1, self.permutation).masked_fill(self.dropped, 0)
        return (
            torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images),
            torch.where(mirrored.view(-1, 1), turned, targets),
        )
