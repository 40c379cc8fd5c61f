"""A training step of a configured network on images of a loader, for bench/loader.py."""

import time

import torch
from torch.nn import functional as F

from models.build import build_network, check_image_size
from models.normalise import Normalise

_CLASSES = 100


def synchronise(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class TrainingStep:
    """Forward and backward pass and update of the configured network, on labels of no meaning."""

    def __init__(self, config, runtime):
        torch.manual_seed(config.seed)
        self.runtime = runtime
        check_image_size(config.model, tuple(config.augment.image_size_hw))
        self.network = build_network(config.model, _CLASSES).to(runtime.device)
        if runtime.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        augment = config.augment
        self.normalise = Normalise(augment.mean, augment.std, config.model.in_channels).to(runtime.device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4)
        self.shape = (config.model.in_channels, *augment.image_size_hw)

    def __call__(self, batch):
        """Make one update."""
        with self.runtime.autocast():
            loss = F.cross_entropy(self.network(self.normalise(batch["images"])), batch["key"] % _CLASSES)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fitting_batch(self, most, seconds):
        """Return the largest batch size, 4, 8, 16 .. up to `most`, of which two steps fit into `seconds`."""
        most = max(most, 2)  # batch norm needs two
        size, keys = min(4, most), torch.arange(most, device=self.runtime.device)
        while True:
            images = torch.zeros(size, *self.shape, dtype=torch.uint8, device=keys.device)
            for _ in range(2):
                started = time.perf_counter()
                self({"images": images, "key": keys[:size]})
                synchronise(self.runtime.device)
            if size == most or 4 * (time.perf_counter() - started) > seconds:  # of twice the size, two steps
                return size
            size = min(2 * size, most)
