"""Networks whose batch norms are folded into convolutions."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.fold import fold_norms


class ReadTwice(nn.Sequential):
    """A norm that is not the only one to read a convolution."""

    def forward(self, images):
        return self[0](images) + super().forward(images)


@pytest.mark.parametrize(
    "network, left",
    [
        (timm.create_model("test_resnet"), 0),
        (timm.create_model("test_efficientnet"), 0),
        (ReadTwice(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), 1),
    ],
)
def test_a_folded_network_gives_the_same(network, left):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(images)  # statistics
        expected = network.eval()(images)
        folded = fold_norms(network.train(), images[:1])
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.eval()(images), expected)
    assert sum(isinstance(module, _BatchNorm) for module in folded.modules()) == left
