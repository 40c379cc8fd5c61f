"""Noise, targets, weights and timesteps of SDXL. Reference equality (diffusers), closed forms, properties of keys."""

import pytest
import torch

from sdxl.config import LossConfig
from sdxl.pictures.sampling import scheduler_config
from sdxl.step import (
    COARSE_DRAW,
    RATIO_DRAW,
    add_coarse_noise,
    add_noise,
    build_noise_table,
    draw_times,
    find_levels,
    loss_weight,
    measure_errors,
    shift_times,
    target,
)
from utils import rng

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


# What sd-scripts computes at all timesteps, in float64. Source: kohya-ss/sd-scripts:library/train_util.py,
# get_huber_threshold_if_needed and conditional_loss, library/custom_train_functions.py.
TABLE = build_noise_table(False)
SNR, STEPS = (TABLE.alpha.double() / TABLE.sigma.double()) ** 2, torch.arange(1000)
SCHEDULES = {
    "exponential": 0.1 ** (STEPS.double() / 1000) * 0.5,
    "snr": 0.9 / (1 + SNR.rsqrt()) ** 2 + 0.1,
    "constant": torch.full_like(SNR, 0.1 * 0.5),
}
WEIGHTS = {
    ("none", "v_prediction"): torch.ones_like(SNR),
    ("min_snr", "epsilon"): SNR.clamp(max=5) / SNR,
    ("min_snr", "v_prediction"): SNR.clamp(max=5) / (SNR + 1),
    ("soft_min_snr", "epsilon"): 5 / (SNR + 5),
    ("as_noise", "v_prediction"): SNR.clamp(max=1000) / (SNR.clamp(max=1000) + 1),
    ("debiased", "epsilon"): SNR.clamp(max=1000).rsqrt(),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_errors_are_those_of_sd_scripts_at_all_timesteps(schedule):
    d, c = NOISE.repeat(167, 1, 1, 1)[:1000].double(), SCHEDULES[schedule].view(-1, 1, 1, 1)
    smooth = 2 * (torch.sqrt(d**2 + c**2) - c)
    for kind, wanted in {"l1": d.abs(), "l2": d**2, "huber": c * smooth, "smooth_l1": smooth}.items():
        loss = LossConfig.model_construct(kind=kind, huber_schedule=schedule, huber_c=0.1, huber_scale=0.5)
        found = measure_errors(loss, d.float(), torch.zeros(()), TABLE, STEPS)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("named", WEIGHTS)
def test_weights_are_those_of_sd_scripts_at_all_timesteps(named):
    found = loss_weight(*named, TABLE.snr, 5.0, 0.0)
    torch.testing.assert_close(found.double(), WEIGHTS[named], rtol=1e-6, atol=1e-6)


def test_pure_noise_is_trained_with_a_floor_alone():
    assert [loss_weight("min_snr", "v_prediction", torch.zeros(1), 5.0, each).item() for each in (0.25, 0)] == [0.25, 0]


def test_noise_has_the_grains_of_sd_scripts():
    """Source: kohya-ss/sd-scripts:library/custom_train_functions.py, pyramid_noise_like."""
    keys, noise = KEYS[:20], torch.randn(20, 4, 16, 12, generator=torch.Generator().manual_seed(2))
    found = add_coarse_noise(noise, keys, 6, 0.8)
    coarse, ratios = rng.normal(keys, (6, 4, 16, 12), COARSE_DRAW), 2 + 2 * rng.uniform(keys, (6,), RATIO_DRAW)
    for sample, wanted in enumerate(noise):
        for level, ratio in enumerate(ratios[sample].tolist()):
            rows, columns = max(1, int(16 / ratio**level)), max(1, int(12 / ratio**level))
            part = coarse[sample : sample + 1, level, :, :rows, :columns]
            wanted = wanted + 0.8**level * torch.nn.Upsample(size=(16, 12), mode="bilinear")(part)[0]
            if rows == 1 or columns == 1:
                break
        torch.testing.assert_close(found[sample], wanted / wanted.std(), rtol=1e-6, atol=2e-6)


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
