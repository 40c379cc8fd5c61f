"""Adan: twenty steps equal timm's."""

import timm.optim
import torch

import optim.vectors
from optim.vectors import Adan


def test_twenty_steps_equal_timms(monkeypatch):
    monkeypatch.setattr(optim.vectors, "PART_ELEMENTS", {"cpu": 5})  # several parts, and tensors that are cut
    generator, settings = torch.Generator().manual_seed(0), {"lr": 0.03, "betas": (0.98, 0.92, 0.99), "eps": 1e-8}
    shapes = [(3,), (2, 4), (2, 3, 2, 2)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    start[2] = start[2].to(memory_format=torch.channels_last)
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    mine = Adan(ours, **settings, weight_decay=0.3)
    other = timm.optim.Adan(theirs, **settings, weight_decay=0.3, no_prox=False, caution=False)
    for _ in range(20):
        for left, right in zip(ours, theirs):
            left.grad = torch.randn(left.shape, generator=generator, dtype=left.dtype)
            right.grad = left.grad.clone()
        mine.step()
        other.step()
    for left, right in zip(ours, theirs):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
