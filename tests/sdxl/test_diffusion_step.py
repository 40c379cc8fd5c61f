"""Noise, targets, weights and timesteps of SDXL. Reference equality (diffusers), closed forms, properties of keys."""

import math

import pytest
import torch

from sdxl.config import LossConfig
from sdxl.pictures.sampling import scheduler_config
from sdxl.step import (
    add_noise,
    build_noise_table,
    draw_times,
    find_levels,
    loss_weight,
    measure_errors,
    shift_times,
    target,
)

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])
KEYS = torch.randint(0, 2**62, (4096,), generator=torch.Generator().manual_seed(0))
LATENTS, NOISE = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("zero", [False, True])
def test_the_table_velocity_and_noisy_latents_equal_those_of_diffusers(zero):
    diffusers = pytest.importorskip("diffusers", reason="make install-sdxl")
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero
    )
    table = build_noise_table(zero)
    level = table.at(TIMESTEPS)
    torch.testing.assert_close(table.alpha.square(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    velocity = theirs.get_velocity(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(target("v_prediction", LATENTS, NOISE, level), velocity, rtol=1e-4, atol=1e-4)
    noisy = theirs.add_noise(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(add_noise(LATENTS, NOISE, level), noisy, rtol=1e-4, atol=1e-4)


def test_literal_weights():
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0])
    weights = {
        ("none", "v_prediction"): [1, 1, 1, 1],
        ("min_snr", "epsilon"): [1, 1, 1, 0.05],
        ("min_snr", "v_prediction"): [0.01 / 1.01, 1 / 2, 5 / 6, 5 / 101],
        ("soft_min_snr", "epsilon"): [5 / 5.01, 5 / 6, 0.5, 5 / 105],
        ("as_noise", "v_prediction"): [0.01 / 1.01, 1 / 2, 5 / 6, 100 / 101],
        ("debiased", "epsilon"): [10, 1, 0.2**0.5, 0.1],
    }
    for (kind, prediction_type), expected in weights.items():
        found = loss_weight(kind, prediction_type, snr, gamma=5.0, floor=0.0)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    # Without a floor, pure noise is never trained, and black images are never learnt.
    assert [loss_weight("min_snr", "v_prediction", torch.zeros(1), 5.0, each).item() for each in (0.25, 0)] == [0.25, 0]


@pytest.mark.parametrize("schedule", ["exponential", "snr", "constant"])
def test_errors_are_those_of_sd_scripts_at_all_timesteps(schedule):
    level, steps, d = build_noise_table(False), torch.arange(1000), NOISE.repeat(167, 1, 1, 1)[:1000]
    c = {"exponential": torch.exp(math.log(0.1) / 1000 * steps), "constant": torch.full((1000,), 0.1)}
    c = c.get(schedule, 0.9 / (1 + level.sigma / level.alpha) ** 2 + 0.1).view(-1, 1, 1, 1)
    smooth = 2 * (torch.sqrt(d**2 + c**2) - c)
    for kind, wanted in {"l1": d.abs(), "l2": d**2, "huber": c * smooth, "smooth_l1": smooth}.items():
        loss = LossConfig.model_construct(kind=kind, huber_schedule=schedule, huber_c=0.1)
        torch.testing.assert_close(measure_errors(loss, d, torch.zeros(()), level, steps), wanted, rtol=1e-5, atol=1e-6)


def test_strata_have_a_timestep_each():
    times = draw_times("stratified", KEYS[:1000], torch.stack([torch.arange(1000), torch.full((1000,), 1000)], dim=1))
    found = find_levels("v_prediction", times, build_noise_table(True))[1]
    assert torch.equal(found.sort().values, torch.arange(1000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_goes_from_the_latents_to_the_noise(shift):
    """As diffusers' FlowMatchEulerDiscreteScheduler scales noise and names timesteps; a shift of 1 changes nothing."""
    scheduler = pytest.importorskip("diffusers", reason="make install-sdxl").FlowMatchEulerDiscreteScheduler(
        shift=shift
    )
    times = 1 - torch.arange(0, 1000, 167) / 1000
    level, timesteps = find_levels("flow", shift_times(times, shift), build_noise_table(False))
    torch.testing.assert_close(timesteps, scheduler.timesteps[::167])
    noisy = add_noise(LATENTS, NOISE, level)
    torch.testing.assert_close(noisy, scheduler.scale_noise(LATENTS, scheduler.timesteps[::167], NOISE))


def test_flow_is_sampled_by_eulers_method():
    config = scheduler_config("flow", False, 3.0)
    scheduler = getattr(
        pytest.importorskip("diffusers", reason="make install-sdxl"), config["_class_name"]
    ).from_config(config)
    scheduler.set_timesteps(5)
    found = wanted = NOISE
    for timestep, now, then in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:]):
        assert 0 <= 1000 * now - timestep < 1  # diffusers rounds it down
        found, wanted = scheduler.step(found.sin(), timestep, found).prev_sample, wanted + (then - now) * wanted.sin()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(scheduler.sigmas[[0, -1]], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)
