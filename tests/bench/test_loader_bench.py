"""What the loader bench advises, from figures that are given."""

import pytest

from bench.loader import Setting, choose

HOST, TWO, FOUR, DEVICE = (Setting(*values) for values in [(False, 0, 8), (False, 2, 8), (False, 4, 8), (True, 0, 8)])


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({HOST: [100.0], TWO: [200.0], FOUR: [400.0]}, FOUR),
        ({HOST: [100.0], TWO: [385.0], FOUR: [400.0]}, TWO),  # 0.96 of the best: fewer workers
        ({HOST: [100.0], TWO: [375.0], FOUR: [400.0]}, FOUR),  # 0.94
        ({HOST: [390.0], DEVICE: [400.0]}, HOST),  # on the host, where it is as good
        ({HOST: [100.0, 110.0, 500.0], FOUR: [390.0, 400.0, 410.0]}, HOST),  # a turn reached the best's median
    ],
)
def test_the_simplest_setting_that_is_near_the_best(found, chosen):
    assert choose(found) == chosen == choose(dict(reversed(found.items())))
