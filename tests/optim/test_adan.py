"""Adan. Reference equality (formula in plain numbers, timm's), bit equality of skipped steps, convergence, dtypes."""

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


def take_step(optimizer, parameters, gradients, found_inf=None):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(float(found_inf))
    optimizer.step()


def bits(optimizer, parameters):
    """Everything that a step may touch, as bytes."""
    tensors = {f"{index}": parameter for index, parameter in enumerate(parameters)}
    for index, parameter in enumerate(parameters):
        tensors |= {f"{index}/{name}": value for name, value in optimizer.state[parameter].items()}
    return {
        name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if tensor.numel()
    }


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


def test_groups_have_their_own_rates_and_decay():
    start, gradients = problem(steps=4)
    together, alone = parameters_at(start), parameters_at(start)
    groups = [{"params": [parameter], "lr": 0.1 * (index + 1)} for index, parameter in enumerate(together)]
    optimizer = make(groups, lr=1.0)
    singles = [make([parameter], lr=0.1 * (index + 1)) for index, parameter in enumerate(alone)]
    for now in gradients:
        take_step(optimizer, together, now)
        for single, parameter, gradient in zip(singles, alone, now):
            take_step(single, [parameter], [gradient])
    assert all(torch.equal(left, right) for left, right in zip(together, alone))


def test_a_parameter_without_gradient_is_left_alone():
    parameters = parameters_at(problem()[0])
    optimizer = make(parameters, lr=0.1, weight_decay=0.5)
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert torch.equal(parameters[1], before) and not optimizer.state[parameters[1]]


# --- skipped steps


@pytest.mark.parametrize(
    ("steps_before", "poison", "dtype"),
    [(0, float("nan"), torch.float32), (1, float("inf"), torch.bfloat16), (5, 1.0, torch.float32)],
)
def test_found_inf_leaves_parameters_and_state_bit_for_bit(steps_before, poison, dtype):
    start, gradients = problem(dtype=dtype)
    parameters = parameters_at(start)
    optimizer = make(parameters, lr=0.1, weight_decay=0.1)
    for now in gradients[:steps_before]:
        take_step(optimizer, parameters, now, found_inf=0)
    before = bits(optimizer, parameters)
    bad = [gradient.clone() for gradient in gradients[steps_before]]
    bad[1].view(-1)[0] = poison
    take_step(optimizer, parameters, bad, found_inf=1)
    after = bits(optimizer, parameters)
    if steps_before:
        assert after == before
    else:  # the state is made by the first step that is tried, and is that of no step
        assert {name: after[name] for name in before} == before
        assert all(not any(value) for name, value in after.items() if "/" in name)


@pytest.mark.parametrize("skipped", [[0, 1, 2], [4, 5, 9]])
def test_skipped_steps_are_change_nothing(skipped):
    start, gradients = problem(steps=12, dtype=torch.float32)
    with_skips, without = parameters_at(start), parameters_at(start)
    skipping, plain = make(with_skips, lr=0.1, weight_decay=0.1), make(without, lr=0.1, weight_decay=0.1)
    for step, now in enumerate(gradients):
        if step in skipped:
            take_step(skipping, with_skips, [torch.full_like(gradient, float("nan")) for gradient in now], found_inf=1)
        else:
            take_step(skipping, with_skips, now, found_inf=0)
            take_step(plain, without, now)
    assert bits(skipping, with_skips) == bits(plain, without)


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
    assert bits(optimizer, through) == bits(other, resumed)
