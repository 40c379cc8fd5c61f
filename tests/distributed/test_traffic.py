"""What a rank sends in an update of two micro-batches, as shares of the parameters."""

import pytest

from bench.traffic import measure


# gathered in each of four passes, but for the task's own unit; reduced once; uncovered; the largest bucket or block
@pytest.mark.parametrize(("parallel", "shares"), [("ddp", [0, 1, 0.01, 0.25]), ("fsdp", [3.84, 1, 0.11, 0.17])])
def test_a_gradient_is_sent_once_in_small_parts_that_overlap_with_the_backward_pass(parallel, shares):
    assert [*measure(parallel).values()] == pytest.approx(shares, abs=0.01)
