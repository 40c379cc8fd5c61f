"""Convolutions of small maps: equal to torch's, forward and backward, where they are used."""

import pytest
import torch
from torch import nn

from models.small_maps import SmallMapConv2d, use_small_maps
from tests.models.outcome import outcome


@pytest.mark.parametrize("kernel, stride, shape", [(3, 1, (2, 1)), (3, 2, (4, 3)), (5, 1, (1, 2)), (3, 2, (3, 4))])
def test_small_maps_equal_torch(kernel, stride, shape, monkeypatch):
    torch.manual_seed(0)
    theirs = nn.Conv2d(64, 8, kernel, stride=stride, padding=kernel // 2).double()
    ours = nn.Sequential(nn.Conv2d(64, 8, kernel, stride=stride, padding=kernel // 2)).double()
    ours[0].load_state_dict(theirs.state_dict())
    use_small_maps(ours)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: True)  # in float64
    x = torch.randn(3, 64, *shape, dtype=torch.float64)
    found = outcome(ours, x)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, outcome(theirs, x), rtol=1e-11, atol=1e-11)


def test_other_convolutions_stay():
    kinds = [{"groups": 8}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"kernel_size": 1, "padding": 0}]
    network = nn.Sequential(*(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **kind}) for kind in kinds))
    use_small_maps(network)
    assert not any(isinstance(module, SmallMapConv2d) for module in network)
