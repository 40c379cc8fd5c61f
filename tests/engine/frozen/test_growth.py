"""What more labels promise holds when they come, and a curve is the same each time."""

import numpy as np
import pytest
import torch

from engine.frozen import growth
from engine.frozen.growth import FEWEST, extrapolate


def make_clouds(count, noise, classes=5, width=400):
    """Return features of clouds around the centres of classes, and labels."""
    centres = np.random.default_rng(9).normal(size=(classes, width))
    random = np.random.default_rng(1)
    labels = random.integers(classes, size=count)
    return torch.from_numpy(centres[labels] + noise * random.normal(size=(count, width))), torch.from_numpy(labels)


@pytest.mark.parametrize("noise", [6.0, 12.0])
def test_what_is_measured_with_more_labels_is_in_the_interval(noise):
    features, labels = make_clouds(800, noise)
    curve = extrapolate(features[:400], labels[:400])
    assert curve["images"] == [400, 800]
    for index, images in enumerate(curve["images"]):
        found = extrapolate(features[:images], labels[:images])["accuracy"][0]
        assert curve["low"][index] <= found + 1e-9 and found <= curve["high"][index] + 1e-9


def test_a_curve_draws_nothing_and_few_or_perfect_images_have_one():
    features, labels = make_clouds(FEWEST, 0.1)
    state = torch.get_rng_state()
    curve = extrapolate(features, labels)
    assert curve == extrapolate(features, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(low <= accuracy <= high <= 1 for _, accuracy, low, high in zip(*curve.values()))
    assert curve["accuracy"][0] > 0.99


def test_the_formula_gives_what_a_computation_by_hand_gives(monkeypatch):
    """240 of 400 are right when each quarter is fitted alone, 320 when all are (docs/how_much.md has the constants)."""
    monkeypatch.setattr(growth, "count_right", lambda features, labels: {100: 60, 400: 320}[len(labels)])
    curve = extrapolate(torch.zeros(400, 1), torch.zeros(400))
    assert curve["accuracy"] == pytest.approx([0.8, 0.8571357], rel=1e-5)
    assert curve["low"] == pytest.approx([0.8, 0.8287485], rel=1e-5)
    assert curve["high"] == pytest.approx([0.8, 0.8814902], rel=1e-5)
