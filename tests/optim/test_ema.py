"""EMA. Reference equality (the recursion in float64), literal warm-up table, round trips bit for bit, skipped steps."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from optim.ema import Averages
from optim.schedules import ema_decay_at

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


def average_of(model):
    return Averages({"": model})


def averaged(averages):
    """The averages of one network by its own names."""
    return {name.removeprefix("."): tensor for name, tensor in averages.tensors().items()}


def same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        a, b = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (left[name], right[name]))
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "step, decay, expected",
    [
        (0, 0.9999, 0.1),  # the first average is nine tenths new: 1/10
        (9, 0.9999, 10 / 19),
        (89_990, 0.9999, 0.9999),  # (1 + t) / (10 + t) passes 0.9999 here
        (0, 0.05, 0.05),  # a lower decay holds from the start
    ],
)
def test_the_decay_warms_up(step, decay, expected):
    assert ema_decay_at(step, decay, warmup=True) == pytest.approx(expected, abs=1e-9)
    assert ema_decay_at(step, decay, warmup=False) == decay


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_twenty_updates_equal_the_recursion_in_float64(dtype, tolerance):
    model = made(dtype)
    ema = average_of(model)
    expected = {name: tensor.double() for name, tensor in deepcopy(model.state_dict()).items()}
    for step in range(20):
        wander(model, step)
        decay = ema_decay_at(step, 0.95, warmup=True)
        ema.update(decay, ONE)
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(averaged(ema)[name].double(), expected[name], rtol=tolerance, atol=tolerance)
    before = deepcopy(averaged(ema))
    ema.update(0.9, torch.tensor(0.0))  # of a skipped step
    same_bits(averaged(ema), before)
    assert averaged(ema)["1.running_mean"].dtype == dtype
    assert averaged(ema)["1.num_batches_tracked"] == model[1].num_batches_tracked == 20  # copied


def test_swapped_holds_the_average_and_gives_the_weights_back_bit_for_bit():
    model = made(torch.float32)
    ema = average_of(model)
    wander(model, 0)
    ema.update(0.7, ONE)
    own, average = deepcopy(model.state_dict()), deepcopy(averaged(ema))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="evaluation broke"), ema.swapped():
        same_bits(model.state_dict(), average)
        wander(model, 3)
        raise RuntimeError("evaluation broke")
    same_bits(model.state_dict(), own)
    same_bits(averaged(ema), average)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses  # optimiser and DDP hold them
