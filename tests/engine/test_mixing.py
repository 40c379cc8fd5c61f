"""Mixup and cutmix as published: timm's arithmetic for the same share and box, probabilities, one draw per batch."""

import pytest
import torch
from timm.data.mixup import mixup_target
from torch.nn import functional as F

from engine.tasks import mixing
from engine.tasks.mixing import Mixing

LABELS = torch.tensor([0, 1, 2, 3, 1, 2])
ONES = torch.ones(6)


def images(count=6):
    return torch.rand(count, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def mix(seed, **changes):
    values = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 1.0, "switch_probability": 0.5} | changes
    torch.manual_seed(seed)
    return Mixing(**values)(images(), F.one_hot(LABELS, 4).float(), ONES)


def test_mixup_is_timms_with_one_share_and_the_reverse_batch():
    """Cross-entropy with label smoothing on our targets equals timm's on its smoothed ones."""
    mixed, targets = mix(0, cutmix_alpha=0.0)
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed, images() * share + images().flip(0) * (1 - share))
    logits = torch.randn(6, 4)
    smooth = mixup_target(LABELS, 4, share, smoothing=0.1)
    theirs = -(smooth * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1), theirs)


def test_cutmix_takes_one_rectangle_of_the_partner_and_its_true_share():
    for seed in range(8):
        mixed, targets = mix(seed, mixup_alpha=0.0)
        from_partner = (mixed == images().flip(0)).all(dim=1) & ~(images() == images().flip(0)).all(dim=1)
        assert all(torch.equal(from_partner[0], found) for found in from_partner)
        rows, columns = from_partner[0].any(dim=1).sum(), from_partner[0].any(dim=0).sum()
        assert from_partner[0].sum() == rows * columns
        assert float(targets[0, 0]) == pytest.approx(1 - float(from_partner[0].float().mean()))
        assert torch.equal(
            mixed[~from_partner[:, None].expand_as(mixed)], images()[~from_partner[:, None].expand_as(mixed)]
        )


def test_the_box_is_timms(monkeypatch):
    """Centre uniform over the image, sides by the root of the area, cut off at the borders."""
    draws = iter([3, 20])
    monkeypatch.setattr(mixing.torch, "randint", lambda high, shape: torch.tensor(next(draws)))
    # sqrt(1 - 0.75) = 0.5: 10 x 12 pixels about (3, 20) of 20 x 24.
    assert mixing._draw_box(20, 24, 0.75) == (0, 8, 14, 24)


def test_probabilities_are_those_given():
    unmixed = sum(torch.equal(mix(seed, probability=0.3)[0], images()) for seed in range(300))
    assert 180 < unmixed < 240
    kinds = [mix(seed, switch_probability=0.8) for seed in range(300)]
    cuts = sum(bool(((found == images()) | (found == images().flip(0))).all()) for found, _ in kinds)
    assert 215 < cuts < 265
    plain, targets = mix(0, probability=0.0)
    assert torch.equal(plain, images()) and torch.equal(targets, F.one_hot(LABELS, 4).float())
    assert not Mixing(0.0, 0.0, 1.0, 0.5).is_on and not Mixing(0.8, 0.0, 0.0, 0.5).is_on
