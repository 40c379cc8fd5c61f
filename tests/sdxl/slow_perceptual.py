"""LPIPS, computed by hand with torchvision's VGG."""

import torch
from torchvision.models import vgg16

from sdxl.autoencoder_losses import PerceptualNetwork
from sdxl.config import PerceptualConfig
from tests.support import refuses


def test_lpips_equals_torchvisions_vgg_with_the_linear_weights(tmp_path):
    torch.manual_seed(0)
    vgg = vgg16(weights=None).eval()
    ends, widths = (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)
    linear = {f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1) for level, width in enumerate(widths)}
    torch.save({f"features.{name}": tensor for name, tensor in vgg.features.state_dict().items()}, tmp_path / "vgg.pth")
    torch.save(linear, tmp_path / "lpips.pth")
    words = {"weight": 1.0, "network": "vgg16", "path": str(tmp_path / "vgg.pth")}
    network = PerceptualNetwork(PerceptualConfig(**words, lpips=str(tmp_path / "lpips.pth"))).eval()
    network.load()
    first, second = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    total, maps = torch.zeros(2), [(first - mean) / std, (second - mean) / std]
    with torch.no_grad():
        for number, layer in enumerate(vgg.features):
            maps = [layer(part) for part in maps]
            if number in ends:
                units = [part / (part.square().sum(1, keepdim=True).sqrt() + 1e-10) for part in maps]
                weight = linear[f"lin{ends.index(number)}.model.1.weight"]
                total += ((units[0] - units[1]).square() * weight).sum(1).mean((1, 2))
        torch.testing.assert_close(network(first, second), total, rtol=1e-3, atol=1e-5)
    with refuses(r"^task\.perceptual\.lpips: (?s:.*)lin1"):
        PerceptualNetwork(
            PerceptualConfig(**words | {"network": "resnet18", "path": None}, lpips=str(tmp_path / "lpips.pth"))
        ).load()
