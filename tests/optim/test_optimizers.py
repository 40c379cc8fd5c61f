"""build_optimizer. Bit equality of skipped steps, reference equality (unfused torch), timm's, refusals."""

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from optim.adan import Adan
from optim.build import build_optimizer, check_optimizer, check_shardable, skips_on_device
from optim.config import OptimConfig, ScheduleConfig
from optim.groups import build_groups, set_group_values
from optim.schedules import GroupValues
from optim.stochastic import StochasticAdamW
from utils.config.entry_point import CONF
from utils.errors import UserError

STEPS = 10
CONSTANT, ONE_CYCLE = (
    TypeAdapter(ScheduleConfig).validate_python(yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text()))
    for name in ("constant", "onecycle")
)


def config(file, **changes):
    values = yaml.safe_load((CONF / "optim" / f"{file}.yaml").read_text()) | changes
    return TypeAdapter(OptimConfig).validate_python(values)


SKIPPING = ("adamw", "adan", "sgd", "bf16")  # on the device


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


def bits(model, optimizer):
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# --- what is built


def test_names_build_their_classes():
    adamw, adan, sgd, bf16 = (build(name, network(name)) for name in SKIPPING)
    assert type(adamw) is torch.optim.AdamW and all(group["fused"] for group in adamw.param_groups)
    assert type(sgd) is torch.optim.SGD and all(group["fused"] for group in sgd.param_groups)
    assert type(adan) is Adan and type(bf16) is StochasticAdamW
    assert all(skips_on_device(optimizer) for optimizer in (adamw, adan, sgd, bf16))


# --- fused equals plain


def plain(name, model):
    """torch's unfused form with the settings of conf/optim, over the same groups."""
    settings = config(name)
    groups = build_groups(model, {}, settings)
    if name == "adamw":
        made = torch.optim.AdamW(groups, lr=0.05, betas=tuple(settings.betas), eps=settings.eps, foreach=False)
    else:
        made = torch.optim.SGD(
            groups, lr=0.05, momentum=settings.momentum, nesterov=settings.nesterov, foreach=False, fused=False
        )
    set_group_values(made, GroupValues(0.05, 0.1, None))
    return made


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_equals_unfused_torch(name):
    ours, theirs = network(), network()
    mine, other = build(name, ours), plain(name, theirs)
    for step in range(STEPS):
        for model, optimizer in ((ours, mine), (theirs, other)):
            set_gradients(model, step)
            optimizer.step()
        for left, right in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


# --- steps that are skipped


@pytest.mark.parametrize(("steps_before", "poison"), [(0, float("nan")), (4, float("inf")), (4, None)])
@pytest.mark.parametrize("name", SKIPPING)
def test_found_inf_leaves_parameters_and_state_bit_for_bit(name, steps_before, poison):
    model = network(name)
    optimizer = build(name, model)
    optimizer.found_inf = torch.tensor(0.0)
    for step in range(steps_before):
        set_gradients(model, step)
        optimizer.step()
    before = bits(model, optimizer)
    set_gradients(model, 99, poison)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = bits(model, optimizer)
    assert {key: after[key] for key in before} == before
    # A state that the first step makes is that of no step at all.
    assert all(not any(value) for key, value in after.items() if key not in before)
    assert steps_before == 0 or after.keys() == before.keys()


def test_sgd_without_momentum_takes_one_from_a_schedule_even_after_a_first_skipped_step():
    """torch makes momentum buffers in the first step, and leaves them uninitialised where that one is skipped."""
    model = network()
    optimizer = build("sgd", model, momentum=0.0, nesterov=False)
    set_group_values(optimizer, GroupValues(0.05, 0.0, 0.95))  # as a one-cycle schedule does
    set_gradients(model, 0, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(not optimizer.state[parameter]["momentum_buffer"].any() for parameter in model.parameters())


# --- timm's


@pytest.mark.parametrize("opt", ["nadamw", "muon", "adafactor"])
def test_timms_optimisers_are_built_and_step(opt):
    model, settings = network(), config("timm", opt=opt)
    check_optimizer(settings, CONSTANT if opt == "adafactor" else ONE_CYCLE)
    optimizer = build("timm", model, opt=opt)
    assert not skips_on_device(optimizer)
    set_gradients(model, 0)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "opt, extra, schedule, message",
    [
        ("nadamv", {}, CONSTANT, "optim.opt: unknown timm optimiser 'nadamv'; close: .*nadamw"),
        ("kron", {}, CONSTANT, "optim.opt: kron"),
        ("nadamw", {"betas": [1.5, 0.9]}, CONSTANT, "optim.extra: "),
        ("sgdw", {}, CONSTANT, "optim.extra: .*momentum"),  # timm's own default
        ("adafactor", {}, ONE_CYCLE, "schedule.cycle_momentum: .* adafactor"),
    ],
)
def test_what_timm_refuses_is_refused_with_its_key(opt, extra, schedule, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_optimizer(config("timm", opt=opt, extra=extra), schedule)


# --- refusals


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValidationError, match=r"optim\.momentum"):
        config("sgd", momentum=0.0)


# --- rows of parameters, as sharded training gives them to a rank


@pytest.mark.parametrize("file", ["adamw", "adan", "sgd"])
def test_ours_step_on_rows_as_on_the_whole(file):
    settings, generator = config(file, weight_decay=0.1), torch.Generator().manual_seed(0)
    check_shardable(settings)
    wholes = [torch.randn(shape, generator=generator) for shape in ((64, 48), (64, 32, 3, 3), (64,))]
    gradients = [[torch.randn(whole.shape, generator=generator) for whole in wholes] for _ in range(3)]
    runs = []
    for count in (1, 2):
        parts = [[torch.nn.Parameter(part.clone()) for part in whole.chunk(count)] for whole in wholes]
        optimizer = build_optimizer(settings, [{"params": sum(parts, []), "weight_decay": 0.05}], 0.01)
        for step in gradients:
            for own, gradient in zip(parts, step):
                for part, rows in zip(own, gradient.chunk(count)):
                    part.grad = rows.clone()
            optimizer.step()
        runs.append([torch.cat([part.detach() for part in own]) for own in parts])
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
