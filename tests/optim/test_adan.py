"""Adan. Reference equality (timm's), state."""

import timm.optim
import torch

import optim.vectors
from optim.adan import Adan

BETAS = (0.98, 0.92, 0.99)


def make(parameters, lr, **settings):
    return Adan(parameters, lr, **{"betas": BETAS, "eps": 1e-8, **settings})


def problem(steps=20, dtype=torch.float64, seed=0):
    """Parameters of several shapes, and gradients for each step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (2, 4), (2, 3, 2, 2)]
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    start[2] = start[2].to(memory_format=torch.channels_last)
    gradients = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(steps)]
    return start, gradients


def parameters_at(start):
    return [torch.nn.Parameter(tensor.clone()) for tensor in start]


def take_step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    optimizer.step()


# --- the formula


def test_twenty_steps_equal_timms(monkeypatch):
    settings = {"lr": 0.03, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.3}
    monkeypatch.setattr(optim.vectors, "PART_ELEMENTS", {"cpu": 5})  # several parts, and tensors that are cut
    start, gradients = problem()
    ours, theirs = parameters_at(start), parameters_at(start)
    mine = make(ours, **settings)
    other = timm.optim.Adan(theirs, **settings, no_prox=False, caution=False)
    for now in gradients:
        take_step(mine, ours, now)
        take_step(other, theirs, now)
    for left, right in zip(ours, theirs):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
