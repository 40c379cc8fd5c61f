"""EMA. Reference equality (the recursion in float64), literal warm-up table, round trips bit for bit, skipped steps."""

import copy

import pytest
import torch
from torch import nn

from optim.ema import EMA, Averages, ema_decay_at

ONE = torch.tensor(1.0)


def made(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)).to(dtype)


def wander(model, step):
    """Give every floating tensor another value, and run the batch norm once."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        model(torch.randn(4, 2, 5, 5, generator=generator, dtype=parameter.dtype))


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        a, b = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (left[name], right[name]))
        assert torch.equal(a, b), name


# --- the decay


@pytest.mark.parametrize(
    "step, decay, expected",
    [
        (0, 0.9999, 0.1),  # the first average is nine tenths new: 1/10
        (1, 0.9999, 2 / 11),
        (9, 0.9999, 10 / 19),
        (90, 0.9999, 0.91),
        (890, 0.9999, 0.99),
        (89_990, 0.9999, 0.9999),  # (1 + t) / (10 + t) passes 0.9999 here
        (10**9, 0.9999, 0.9999),  # and never goes above
        (0, 0.05, 0.05),  # a lower decay holds from the start
        (500, 0.0, 0.0),  # no average: the weights themselves
    ],
)
def test_the_decay_warms_up(step, decay, expected):
    assert ema_decay_at(step, decay, warmup=True) == pytest.approx(expected, abs=1e-9)
    assert ema_decay_at(step, decay, warmup=False) == decay


# --- the recursion


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_twenty_updates_equal_the_recursion_in_float64(dtype, tolerance):
    model = made(dtype)
    ema = EMA(model)
    expected = {name: tensor.double() for name, tensor in copied(model).items()}
    for step in range(20):
        wander(model, step)
        decay = ema_decay_at(step, 0.95, warmup=True)
        ema.update(decay, ONE)
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ema.tensors[name].double(), expected[name], rtol=tolerance, atol=tolerance)
    assert ema.tensors["1.running_mean"].dtype == dtype


def test_counters_are_copied_not_averaged():
    model = made()
    ema = EMA(model)
    wander(model, 0)
    ema.update(0.9, ONE)
    counter = ema.tensors["1.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter == model[1].num_batches_tracked == 1


def test_a_skipped_step_keeps_the_average_bit_for_bit():
    model = made(torch.float32)
    ema = EMA(model)
    for step in range(3):
        wander(model, step)
        ema.update(0.9, ONE)
    before = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    ema.update(0.9, torch.tensor(0.0))
    same_bits(ema.tensors, before)


def test_updates_do_not_touch_the_weights_nor_share_memory_with_them():
    model = made()
    before = copied(model)
    ema = EMA(model)
    ema.update(0.5, ONE)
    same_bits(copied(model), before)
    wander(model, 1)
    same_bits({name: ema.tensors[name] for name in ("0.weight",)}, {"0.weight": before["0.weight"]})


# --- swapped


def test_swapped_holds_the_average_and_gives_the_weights_back_bit_for_bit():
    model = made(torch.float32)
    ema = EMA(model)
    wander(model, 0)
    ema.update(0.7, ONE)
    own, average = copied(model), copy.deepcopy(ema.tensors)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.swapped():
        same_bits(copied(model), average)
    same_bits(copied(model), own)
    same_bits(ema.tensors, average)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses  # optimiser and DDP hold them


def test_an_evaluation_that_breaks_or_changes_buffers_leaves_weights_and_average_alone():
    model = made(torch.float32)
    ema = EMA(model)
    average = copy.deepcopy(ema.tensors)
    wander(model, 0)
    own = copied(model)
    with pytest.raises(RuntimeError, match="evaluation broke"), ema.swapped():
        wander(model, 3)
        raise RuntimeError("evaluation broke")
    same_bits(copied(model), own)
    same_bits(ema.tensors, average)


# --- saving


def test_a_saved_average_continues_as_if_uninterrupted():
    model = made(torch.float32)
    through = EMA(model)
    for step in range(3):
        wander(model, step)
        through.update(0.8, ONE)
    resumed = EMA(model)
    resumed.load(copy.deepcopy(through.tensors))
    for step in range(3, 6):
        wander(model, step)
        through.update(0.8, ONE)
        resumed.update(0.8, ONE)
    same_bits(through.tensors, resumed.tensors)


def test_the_average_of_another_network_is_not_taken():
    with pytest.raises(AssertionError, match="another network"):
        EMA(made()).load({"0.weight": torch.zeros(1)})


# --- several networks


def test_averages_of_several_networks_are_those_of_each_alone():
    models, devices = {"unet": made(), "encoder": made()}, {"unet": "device", "encoder": "cpu"}
    averages = Averages(models, devices)
    alone = {name: EMA(model) for name, model in models.items()}
    for step in range(5):
        for number, (name, model) in enumerate(models.items()):
            wander(model, 10 * step + number)
            alone[name].update(0.9, ONE)
        averages.update(0.9, ONE)
    expected = {f"{name}.{key}": tensor for name, ema in alone.items() for key, tensor in ema.tensors.items()}
    same_bits(averages.tensors(), expected)
    before = {name: copied(model) for name, model in models.items()}
    with averages.swapped():
        for name, model in models.items():
            same_bits(copied(model), alone[name].tensors)
    for name, model in models.items():
        same_bits(copied(model), before[name])
    again = Averages(models, devices)
    again.load(averages.tensors())
    same_bits(again.tensors(), expected)
