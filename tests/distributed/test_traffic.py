"""What a rank sends in an update of two micro-batches, as shares of the parameters."""

import pytest

from bench.traffic import measure


def test_a_gradient_is_sent_once_in_small_parts_that_overlap_with_the_backward_pass():
    assert measure() == pytest.approx({"reduced": 1, "uncovered": 0.01, "largest": 0.25}, abs=0.01)
