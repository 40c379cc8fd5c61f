"""Adan. Reference equality (formula in plain numbers, timm's), state."""

import copy
import math

import pytest
import timm.optim
import torch

import optim.vectors
from optim.adan import Adan

BETAS = (0.98, 0.92, 0.99)


def slow_adan(theta, gradients, *, lr, betas, eps, weight_decay):
    """One number through algorithm 1 of arXiv:2208.06677, in the betas of its code, with bias corrections."""
    beta1, beta2, beta3 = betas
    m = v = n = 0.0
    path = []
    for k, g in enumerate(gradients, start=1):
        difference = g - gradients[k - 2] if k > 1 else 0.0
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * difference
        n = beta3 * n + (1 - beta3) * (g + beta2 * difference) ** 2
        m_hat, v_hat, n_hat = m / (1 - beta1**k), v / (1 - beta2**k), n / (1 - beta3**k)
        theta = (theta - lr * (m_hat + beta2 * v_hat) / (math.sqrt(n_hat) + eps)) / (1 + lr * weight_decay)
        path.append(theta)
    return path


def make(parameters, lr, **settings):
    return Adan(parameters, lr, **{"betas": BETAS, "eps": 1e-8, **settings})


def problem(steps=20, dtype=torch.float64, seed=0):
    """Parameters of several shapes, and gradients for each step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (2, 4), (1, 1, 2, 2)]
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(steps)]
    return start, gradients


def parameters_at(start):
    return [torch.nn.Parameter(tensor.clone()) for tensor in start]


def take_step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    optimizer.step()


# --- the formula


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.0, 0.0)])
def test_twenty_steps_equal_the_formula(betas, weight_decay):
    settings = {"lr": 0.03, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    start, gradients = problem()
    parameters = parameters_at(start)
    optimizer = make(parameters, **settings)
    for step, now in enumerate(gradients):
        take_step(optimizer, parameters, now)
        for index, parameter in enumerate(parameters):
            for place, value in enumerate(parameter.detach().flatten().tolist()):
                history = [earlier[index].flatten()[place].item() for earlier in gradients[: step + 1]]
                expected = slow_adan(start[index].flatten()[place].item(), history, **settings)[-1]
                assert value == pytest.approx(expected, rel=1e-12, abs=1e-12), (step, index, place)


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


# --- state


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_state_has_the_layout_of_its_parameter(memory_format):
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=memory_format))
    optimizer = make([parameter], lr=0.1)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].is_contiguous(memory_format=memory_format)


def test_a_saved_state_continues_as_if_uninterrupted():
    start, gradients = problem(steps=8, dtype=torch.float32)
    through = parameters_at(start)
    optimizer = make(through, lr=0.1, weight_decay=0.1)
    for now in gradients[:4]:
        take_step(optimizer, through, now)
    resumed = parameters_at(through)
    other = make(resumed, lr=0.1, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for now in gradients[4:]:
        take_step(optimizer, through, now)
        take_step(other, resumed, now)
    for left, right in zip(through, resumed):
        assert torch.equal(left, right)
        assert all(torch.equal(value, other.state[right][name]) for name, value in optimizer.state[left].items())
