"""Losses of a tagger: each is its formula, written out in numpy; the gradient of ASL is that of the official code."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import expit as sigmoid

from engine.tasks.config import TagLossConfig
from engine.tasks.tag_losses import tag_loss

DEFAULTS = {"gamma_neg": 4.0, "clip": 0.05, "gamma": 2.0, "alpha": 0.25}
LOGITS = torch.linspace(-12, 12, 97).repeat(2, 1)
HARD = (torch.arange(97) % 3 == 0).float().repeat(2, 1)
SOFT = torch.linspace(0, 1, 97)[torch.randperm(97, generator=torch.Generator().manual_seed(0))].repeat(2, 1)


def make(name, **changes):
    return partial(tag_loss, TagLossConfig(name=name, **{**DEFAULTS, **changes}))


def bce_formula(x, y, **_):
    return -y * np.log(sigmoid(x)) - (1 - y) * np.log(1 - sigmoid(x))


def focal_formula(x, y, *, gamma, alpha, **_):
    """Equation 5 of Lin et al.; a soft target mixes the two sides."""
    p_t = y * sigmoid(x) + (1 - y) * sigmoid(-x)
    return (y * alpha + (1 - y) * (1 - alpha)) * (1 - p_t) ** gamma * bce_formula(x, y)


def asl_formula(x, y, *, gamma_neg, clip, **_):
    """Equations 4 to 7 of Ridnik et al.; of soft targets, as the official code has it."""
    p = sigmoid(x)
    p_m = np.maximum(p - clip, 0)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p_m)) * (1 - (y * p + (1 - y) * (1 - p_m))) ** (gamma_neg * (1 - y))


CASES = [
    ("bce", bce_formula, {}),
    ("focal", focal_formula, {}),
    ("focal", focal_formula, {"gamma": 1.0, "alpha": 0.9}),
    ("asl", asl_formula, {}),
    ("asl", asl_formula, {"gamma_neg": 7.0, "clip": 0.2}),
    ("asl", asl_formula, {"gamma_neg": 0.0, "clip": 0.0}),
]


@pytest.mark.parametrize("name, formula, changes", CASES)
def test_a_loss_is_its_formula_and_finite_for_extreme_logits(name, formula, changes):
    loss = make(name, **changes)
    for targets in (HARD, SOFT):
        found = loss(LOGITS, targets)
        expected = formula(LOGITS.double().numpy(), targets.double().numpy(), **{**DEFAULTS, **changes})
        assert found.dtype == torch.float32 and found.shape == LOGITS.shape
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6)
    logits = torch.tensor([[-100.0, -30, 0, 30, 100]], dtype=torch.float16).repeat(3, 1).requires_grad_()
    losses = loss(logits, torch.tensor([[0.0], [1.0], [0.3]]).expand(3, 5))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and logits.grad.isfinite().all()
    assert losses.min() >= 0


def official_asl(x, y, gamma_neg, clip, eps=1e-8):
    """Alibaba-MIIL/ASL's steps, without the sum, with `disable_torch_grad_focal_loss`."""
    xs_pos = torch.sigmoid(x)
    xs_neg = (1 - xs_pos + clip).clamp(max=1)
    loss = y * torch.log(xs_pos.clamp(min=eps)) + (1 - y) * torch.log(xs_neg.clamp(min=eps))
    with torch.no_grad():
        focus = torch.pow(1 - xs_pos * y - xs_neg * (1 - y), gamma_neg * (1 - y))
    return -loss * focus


def test_the_gradient_of_asl_is_the_official_codes_and_a_lost_positive_has_one():
    for gamma, clip in ((4.0, 0.05), (7.0, 0.2)):
        ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
        make("asl", gamma_neg=gamma, clip=clip)(ours, HARD).sum().backward()
        official_asl(theirs, HARD, gamma, clip).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    lost = torch.tensor([[-40.0]], requires_grad=True)
    make("asl")(lost, torch.ones(1, 1)).sum().backward()
    assert lost.grad.item() == pytest.approx(-1.0)
