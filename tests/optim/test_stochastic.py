"""bfloat16 weights. Unbiased rounding, reference equality (torch's float32 AdamW), exact resume."""

import pytest
import torch

import optim.vectors
from optim.vectors import StochasticAdamW, draw_noise, round_stochastically

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def parameters_of(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]


def take_steps(optimizer, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        optimizer.update = step
        optimizer.step()


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    values = torch.tensor([1.001, -1.001, 3e-5, -7.77, 1.9999, 1e-40, 0.0, 1.5])  # a carry, a subnormal, exact ones
    values_of = values.expand(200_000, 8).contiguous()
    found = round_stochastically(values_of, draw_noise(values_of.shape, values.device, 0, 0))
    step = values.abs().clamp(min=2.0**-126) * 2.0**-7  # at least the distance of the neighbours
    assert found.dtype == torch.bfloat16 and ((found.float() - values).abs() < step).all()
    error = (found.double().mean(dim=0) - values.double()).abs()
    assert (error <= 5 * step / 2 / 200_000**0.5).all()  # five deviations of a mean
    assert (found[:, 6:].float() == values[6:]).all()


def test_it_follows_torchs_adamw_in_float32(monkeypatch):
    monkeypatch.setattr(optim.vectors, "PART_ELEMENTS", {"cpu": 5000})  # several parts
    ours = parameters_of((64, 64), (4096,), (8, 8, 8, 8))
    ours[2].data = ours[2].data.to(memory_format=torch.channels_last)
    theirs = [torch.nn.Parameter(parameter.detach().float()) for parameter in ours]
    start = [parameter.detach().float().clone() for parameter in ours]
    optimizer, reference = StochasticAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for made in (optimizer, reference):
        made.param_groups[0]["weight_decay"] = 0.1
    for step in range(30):
        take_steps(optimizer, ours, [step])
        for mine, other in zip(ours, theirs):
            other.grad = mine.grad.float()
        reference.step()
    for mine, other, before in zip(ours, theirs, start):
        moved, wanted = (mine.float() - before).flatten(), (other - before).flatten()
        assert (moved @ wanted / wanted.square().sum()).item() == pytest.approx(1.0, abs=0.1)
        state, expected = optimizer.state[mine], reference.state[other]
        torch.testing.assert_close(state["exp_avg_sq"].float(), expected["exp_avg_sq"], rtol=0.2, atol=1e-5)
        assert (state["exp_avg_sq"].float().sum() / expected["exp_avg_sq"].sum()).item() == pytest.approx(1, abs=2e-3)
        assert state["step"] == 30 and state["exp_avg"].stride() == mine.stride()
