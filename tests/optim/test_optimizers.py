"""build_optimizer. Bit equality of skipped steps, reference equality (unfused torch), timm's, refusals."""

import pytest
import timm.optim
import torch
from pydantic import TypeAdapter
from torch import nn

from bench.measure import read_values
from optim.alone import round_stochastically, step_each
from optim.build import build_optimizer, check_optimizer, step_by_gradients
from optim.config import OptimConfig, ScheduleConfig
from optim.groups import build_groups, set_group_values
from optim.schedules import GroupValues
from optim.state import optimizer_state

STEPS = 10
CONSTANT, ONE_CYCLE = (
    TypeAdapter(ScheduleConfig).validate_python(read_values("schedule", name)) for name in ("constant", "onecycle")
)
ZERO = torch.tensor(0.0)


def config(file, **changes):
    return TypeAdapter(OptimConfig).validate_python(read_values("optim", file) | changes)


def network(name=""):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    return made.bfloat16() if name == "bf16" else made


def build(file, model, lr=0.05, weight_decay=0.1, **changes):
    settings = config("adamw", bf16_weights=True) if file == "bf16" else config(file, **changes)
    optimizer = build_optimizer(settings, build_groups(model, {}, settings), lr)
    set_group_values(optimizer, GroupValues(lr, weight_decay, None))
    return optimizer


def set_gradients(model, step, poison=None):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if poison is not None:
        next(model.parameters()).grad[0, 0] = poison


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    values = torch.tensor([1.001, -1.001, 3e-5, -7.77, 1.9999, 1e-40, 0.0, 1.5])  # a carry, a subnormal, exact ones
    found = round_stochastically(values.expand(200_000, 8).contiguous(), torch.Generator().manual_seed(0))
    step = values.abs().clamp(min=2.0**-126) * 2.0**-7  # at least the distance of the neighbours
    assert found.dtype == torch.bfloat16 and ((found.float() - values).abs() < step).all()
    error = (found.double().mean(dim=0) - values.double()).abs()
    assert (error <= 5 * step / 2 / 200_000**0.5).all()  # five deviations of a mean
    assert (found[:, 6:].float() == values[6:]).all()


def test_bf16_weights_follow_torchs_adamw_in_float32():
    ours = nn.ParameterList(torch.randn(shape).bfloat16() for shape in ((64, 64), (4096,), (8, 8, 8, 8)))
    ours[2].data = ours[2].data.to(memory_format=torch.channels_last)
    theirs = nn.ParameterList(parameter.detach().float() for parameter in ours)
    start = [parameter.detach().clone() for parameter in theirs]
    optimizer, reference = build("bf16", ours, lr=1e-3), build("adamw", theirs, lr=1e-3)
    for step in range(30):
        set_gradients(ours, step)
        for mine, other in zip(ours, theirs):
            other.grad = torch.empty_like(other).copy_(mine.grad)  # in its layout
        step_by_gradients(optimizer, 1 - ZERO, step)
        reference.step()
    for mine, other, before in zip(ours, theirs, start):
        moved, wanted = (mine.float() - before).flatten(), (other - before).flatten()
        assert (moved @ wanted / wanted.square().sum()).item() == pytest.approx(1.0, abs=0.1)
        state, expected = optimizer.state[mine], reference.state[other]
        torch.testing.assert_close(state["exp_avg_sq"].float(), expected["exp_avg_sq"], rtol=0.2, atol=1e-5)
        assert (state["exp_avg_sq"].float().sum() / expected["exp_avg_sq"].sum()).item() == pytest.approx(1, abs=2e-3)
        assert state["step"] == 30 and state["exp_avg"].dtype == torch.bfloat16
        assert state["exp_avg"].stride() == mine.stride()


def test_sgd_without_momentum_takes_one_from_a_schedule_even_after_a_first_skipped_step():
    """torch makes momentum buffers in the first step, and leaves them uninitialised where that one is skipped."""
    model = network()
    optimizer = build("sgd", model, momentum=0.0)
    set_group_values(optimizer, GroupValues(0.05, 0.0, 0.95))  # as a one-cycle schedule does
    set_gradients(model, 0, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(not optimizer.state[parameter]["momentum_buffer"].any() for parameter in model.parameters())


def test_muon_that_skips_on_a_device_is_what_it_was(monkeypatch):
    """On a CPU in place of a GPU, for which alone timm makes such steps; tests/fake_cuda.py looks for host reads."""
    monkeypatch.setattr("timm.optim.adamw._check_capturable_devices", lambda *_: None)
    models, optimizers = zip(*[(model := network(), build("muon", model)) for _ in range(2)])
    optimizers[1].param_groups[0]["capturable"] = optimizers[1].param_groups[1]["capturable"] = True
    for number, applied in enumerate(torch.tensor([1.0, 1.0, 0.0, 1.0])):
        before = [tensor.clone() for tensor in tensors_of(models[1], optimizers[1])]
        for model, optimizer in zip(models, optimizers):
            set_gradients(model, number, None if applied else torch.nan)
            step_by_gradients(optimizer, applied, number)
        assert applied or all(map(torch.equal, before, tensors_of(models[1], optimizers[1])))
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=1e-2, atol=1e-4)


def tensors_of(model, optimizer):
    return [*model.parameters(), *optimizer_state(optimizer)[0].values()]


def test_the_optimisers_of_timm_that_a_fused_pass_takes_update_each_parameter_alone():
    """All that run on a CPU: three steps of all parameters, together and one after another."""
    refused, wrong = [], []
    for opt in timm.optim.list_optimizers():
        if opt.startswith(("kron", "adahessian", "bnb", "fused")):  # refused, or not for CPUs
            continue
        extra = {"momentum": 0.9} if opt.startswith(("csgd", "n", "sgd")) and "adam" not in opt else {}
        try:
            settings = config("timm", opt=opt, fused_backward=True, extra=extra if "novo" not in opt else {})
        except ValueError as error:
            assert "optim.fused_backward: true" in str(error)
            refused.append(opt)
            continue
        models = [network(), network()]
        for model, step in zip(
            models, (lambda optimizer: optimizer.step(), lambda optimizer: step_each(optimizer, ZERO, 0))
        ):
            optimizer = build_optimizer(settings, build_groups(model, {}, settings), 0.05)
            for number in range(3):
                set_gradients(model, number)
                step(optimizer)
        wrong += [opt] * (not all(map(torch.equal, *(model.parameters() for model in models))))
    assert wrong == [] and {"lamb", "adan"} <= set(refused) < {*refused, "adamw"}


def test_only_the_optimisers_of_bitsandbytes_replace_the_memory_of_parameters():
    assert config("timm").keeps_layout and not config("timm", opt="bnbadamw8bit").keeps_layout


REFUSED = [
    ("timm", {"opt": "nadamv"}, "optim.opt: 'nadamv' .*; close: .*nadamw"),
    ("timm", {"opt": "kron"}, "optim.opt: kron"),
    ("timm", {"opt": "nadamw", "extra": {"betas": [1.5, 0.9]}}, "optim.extra: "),
    ("timm", {"opt": "sgdw"}, "optim.extra: .*momentum"),  # timm's own default
    ("timm", {"opt": "adafactor"}, "schedule.cycle_momentum: .* adafactor"),
    ("prodigy", {"layer_decay": 0.9}, "optim.layer_decay: 0.9"),
    ("prodigy", {"rules": [{"match": "2.*", "lr_scale": 0.1}]}, "optim.rules.0.lr_scale: 0.1"),
]  # fmt: skip


@pytest.mark.parametrize("file, changes, message", REFUSED)
def test_what_an_optimiser_cannot_do_is_refused_with_its_key(file, changes, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(config(file, **changes), ONE_CYCLE)
