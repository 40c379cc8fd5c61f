"""Losses of a tagger: each is its formula, written out in numpy; the gradient of ASL is that of the official code."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.tasks.tag_losses import TagLoss, TagLossConfig, bce, frequency_weights

DEFAULTS = {"gamma_pos": 0.0, "gamma_neg": 4.0, "clip": 0.05, "alpha": None, "margin": 1.0}
LOGITS = torch.linspace(-12, 12, 97).repeat(2, 1)
HARD = (torch.arange(97) % 3 == 0).float().repeat(2, 1)
SOFT = torch.linspace(0, 1, 97)[torch.randperm(97, generator=torch.Generator().manual_seed(0))].repeat(2, 1)


def make(name, **changes):
    return TagLoss(TagLossConfig(name=name, **{**DEFAULTS, **changes}))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce_formula(x, y, **_):
    return -y * np.log(sigmoid(x)) - (1 - y) * np.log(1 - sigmoid(x))


def asl_formula(x, y, *, gamma_pos, gamma_neg, clip, **_):
    """Equations 4 to 7 of Ridnik et al.; of soft targets, as the official code has it."""
    p = sigmoid(x)
    p_m = np.maximum(p - clip, 0)
    right = y * p + (1 - y) * (1 - p_m)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p_m)) * (1 - right) ** (gamma_pos * y + gamma_neg * (1 - y))


def focal_formula(x, y, *, gamma_pos, alpha, **_):
    p_t = y * sigmoid(x) + (1 - y) * (1 - sigmoid(x))
    balance = 1 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return balance * (1 - p_t) ** gamma_pos * bce_formula(x, y)


def hill_formula(x, y, *, gamma_pos, margin, **_):
    p, p_m = sigmoid(x), sigmoid(x - margin)
    return -y * (1 - p_m) ** gamma_pos * np.log(p_m) + (1 - y) * (1.5 - p) * p**2


CASES = [
    ("bce", bce_formula, {}),
    ("asl", asl_formula, {}),
    ("asl", asl_formula, {"gamma_pos": 1.0, "gamma_neg": 7.0, "clip": 0.2}),
    ("asl", asl_formula, {"gamma_neg": 0.0, "clip": 0.0}),
    ("focal", focal_formula, {"gamma_pos": 2.0, "alpha": 0.25}),
    ("focal", focal_formula, {"gamma_pos": 0.5}),
    ("hill", hill_formula, {"gamma_pos": 2.0}),
    ("hill", hill_formula, {"gamma_pos": 0.5, "margin": 0.3}),
]


@pytest.mark.parametrize(("name", "formula", "changes"), CASES)
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
def test_a_loss_is_its_formula(name, formula, changes, targets):
    found = make(name, **changes)(LOGITS, targets, 0.0)
    expected = formula(LOGITS.double().numpy(), targets.double().numpy(), **{**DEFAULTS, **changes})
    assert found.dtype == torch.float32 and found.shape == LOGITS.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "positive", "negative"),
    [
        ("bce", {}, math.log(2), math.log(2)),
        ("asl", {}, math.log(2), -math.log(0.55) * 0.45**4),  # p_m = 0.45
        ("focal", {"gamma_pos": 2.0, "alpha": 0.25}, 0.0625 * math.log(2), 0.1875 * math.log(2)),
        ("hill", {"margin": 0.0}, math.log(2), 0.25),
    ],
)
def test_at_probability_one_half(name, changes, positive, negative):
    """By hand."""
    found = make(name, **changes)(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 0.0)
    assert found.tolist()[0] == pytest.approx([positive, negative], rel=1e-6)


def official_asl(x, y, gamma_neg, gamma_pos, clip, eps=1e-8):
    """Alibaba-MIIL/ASL's steps, without the sum, with `disable_torch_grad_focal_loss`."""
    xs_pos = torch.sigmoid(x)
    xs_neg = (1 - xs_pos + clip).clamp(max=1)
    loss = y * torch.log(xs_pos.clamp(min=eps)) + (1 - y) * torch.log(xs_neg.clamp(min=eps))
    with torch.no_grad():
        focus = torch.pow(1 - xs_pos * y - xs_neg * (1 - y), gamma_pos * y + gamma_neg * (1 - y))
    return -loss * focus


def test_asl_and_its_gradient_are_the_official_codes():
    for gammas in ((4.0, 0.0, 0.05), (4.0, 1.0, 0.05), (7.0, 0.0, 0.2)):
        ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
        found = make("asl", gamma_neg=gammas[0], gamma_pos=gammas[1], clip=gammas[2])(ours, HARD, 0.0)
        expected = official_asl(theirs, HARD, *gammas)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "formula", "changes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_of_any_precision_are_finite_and_so_are_their_gradients(name, formula, changes, dtype):
    logits = torch.tensor([[-100.0, -30, 0, 30, 100]], dtype=dtype).repeat(3, 1).requires_grad_()
    targets = torch.tensor([[0.0], [1.0], [0.3]]).expand(3, 5)
    losses = make(name, **changes)(logits, targets, 0.0)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and logits.grad.isfinite().all()
    assert losses.min() >= 0


@pytest.mark.parametrize(("name", "changes"), [("asl", {}), ("asl", {"clip": 0.0, "gamma_neg": 1.0}), ("bce", {})])
def test_a_positive_that_is_lost_still_has_a_gradient(name, changes):
    logits = torch.tensor([[-40.0]], requires_grad=True)
    make(name, **changes)(logits, torch.ones(1, 1), 0.0).sum().backward()
    assert logits.grad.item() == pytest.approx(-1.0)


def test_a_pair_moves_over_the_run():
    moving, progress = make("asl", gamma_neg=[0.0, 4.0], clip=[0.2, 0.0]), torch.tensor(0.5)
    torch.testing.assert_close(moving(LOGITS, HARD, progress), make("asl", gamma_neg=2.0, clip=0.1)(LOGITS, HARD, 0.0))
    with pytest.raises(ValidationError, match="less than 1"):
        make("asl", clip=[0.0, 1.0])


def test_frequency_weights_by_hand():
    found = frequency_weights(torch.tensor([100, 400, 25, 0, 10**9]), 0.5)
    assert found.tolist() == pytest.approx([1.0, 0.5, 2.0, 10.0, 0.1]) and found.dtype == torch.float32
    assert bce(torch.zeros(1, 1), torch.zeros(1, 1)).shape == (1, 1)
