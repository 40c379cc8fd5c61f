"""The one-pass kernel against its formula, for any order of the axes, without a copy."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from optim.fused import subtract_scaled_

LAYOUTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "channels-last": lambda shape: torch.randn(shape).to(memory_format=torch.channels_last),
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subtract_scaled__is_its_formula(layout):
    make = LAYOUTS[layout]
    target, source, copy = make((6, 4, 3, 2)), make((6, 4, 3, 2)), make((6, 4, 3, 2))
    expected, strides = target - 0.25 * (source + 0.5 * target), target.stride()
    subtract_scaled_([target], [source], 0.25, decay=0.5)
    torch.testing.assert_close(target, expected)
    expected = target - 0.25 * source
    subtract_scaled_([target], [source], 0.25, copy_to=[copy])
    torch.testing.assert_close(target, expected)
    assert torch.equal(copy, source) and target.stride() == copy.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_changes_where_a_step_is_skipped(layout):
    target = LAYOUTS[layout]((2, 3, 4, 5))
    before, source = target.clone(), torch.full_like(target, torch.nan)
    subtract_scaled_([target], [source], 0.25, decay=0.5, found_inf=torch.ones(()))
    assert torch.equal(target, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_is_copied(layout):
    target, source = LAYOUTS[layout]((8, 8, 3, 3)), LAYOUTS[layout]((8, 8, 3, 3))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        subtract_scaled_([target], [source], 0.25)
    assert not {event.key for event in found.key_averages()} & {"aten::clone", "aten::copy_"}
