"""What the loader bench advises, from figures that are given."""

from types import SimpleNamespace

import pytest
import torch

from bench.loader import Setting, choose, explain, fitting_batch, other_sizes

HOST, TWO, FOUR, DEVICE = (Setting(*values) for values in [(False, 0, 4, 8), (False, 2, 4, 8), (False, 4, 4, 8),
                                                           (True, 0, 4, 8)])  # fmt: skip


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


@pytest.mark.parametrize(
    ("chosen", "without", "compiled", "more"),
    [
        (TWO, 1000.0, False, ""),
        (TWO, 205.0, False, " The network is the limit, not the loader."),
        (HOST, 1000.0, False, " Of settings that differ by less than the turns do, the simplest is taken."),
        (TWO, 1000.0, "auto", ""),  # on a CPU, which does not compile unasked
        (TWO, 1000.0, True, " Its steps here are eager; a compiled run needs more images per second."),
    ],
)
def test_why_it_is_advised(chosen, without, compiled, more):
    config = SimpleNamespace(model=SimpleNamespace(name="resnet18"), runtime=SimpleNamespace(compile=compiled))
    machine, training = SimpleNamespace(device=torch.device("cpu")), {HOST: [190.0, 210.0], TWO: [210.0]}
    said = explain(config, machine, chosen, {HOST: [300.0], TWO: [900.0, 700.0]}, training, without)
    assert said == (
        f"why: training steps of resnet18 on cpu get {200 if chosen == HOST else 210} images/s with it and 210 with "
        f"the best setting; the network alone takes {without:,.0f}, and reading alone gives up to 800.{more}"
    )


def test_other_batch_sizes_are_measured_beside_one_that_fits():
    assert other_sizes(fitting_batch(64, 0.0, 1.0)) == [32, 128]
    assert other_sizes(fitting_batch(1, 9.0, 1.0)) == [2]  # loop.batch_size=1
