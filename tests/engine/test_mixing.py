"""Mixup and cutmix as published: timm's arithmetic for the same share and box, probabilities, one draw per batch."""

import pytest
import torch
from timm.data.mixup import mixup_target
from torch.nn import functional as F

from engine.tasks import mixing
from engine.tasks.config import MixingConfig
from engine.tasks.mixing import Mixing

LABELS = torch.tensor([0, 1, 2, 3, 1, 2])
TARGETS = F.one_hot(LABELS, 4).float()
ONES = torch.ones(6)


def images(count=6):
    return torch.rand(count, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def make(**changes):
    return Mixing(MixingConfig(**{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 1.0, **changes}))


def mix(seed, weight=ONES, **changes):
    torch.manual_seed(seed)
    return make(**changes)(images(), TARGETS, weight)


def test_mixup_is_timms_with_one_share_and_the_reverse_batch():
    """Cross-entropy with label smoothing on our targets equals timm's on its smoothed ones."""
    mixed, targets = mix(0, cutmix_alpha=0.0)
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed, images() * share + images().flip(0) * (1 - share))
    logits = torch.randn(6, 4)
    theirs = -(mixup_target(LABELS, 4, share, smoothing=0.1) * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1), theirs)


def test_cutmix_takes_one_rectangle_of_the_partner_and_its_true_share():
    for seed in range(8):
        mixed, targets = mix(seed, mixup_alpha=0.0)
        partners = images().flip(0)
        box, *others = (mixed == partners).all(dim=1) & ~(images() == partners).all(dim=1)
        assert all(torch.equal(box, other) for other in others)
        assert box.sum() == box.any(dim=1).sum() * box.any(dim=0).sum()
        assert float(targets[0, 0]) == pytest.approx(1 - float(box.float().mean()))
        assert torch.equal(torch.where(box, images(), mixed), images())


def test_the_box_is_timms(monkeypatch):
    """Centre uniform over the image, sides by the root of the area, cut off at the borders."""
    monkeypatch.setattr(mixing.torch, "rand", lambda count, device: torch.tensor([0.0, 0.0, 3.5 / 20, 20.5 / 24]))
    monkeypatch.setattr(mixing.torch.distributions.Beta, "sample", lambda self: torch.tensor(0.75))
    # sqrt(1 - 0.75) = 0.5: 10 x 12 pixels about (3, 20) of 20 x 24.
    share, box = make(mixup_alpha=0.0).draw(20, 24, torch.device("cpu"))
    expected = torch.zeros(20, 24, dtype=torch.bool)
    expected[:8, 14:] = True
    assert torch.equal(box, expected) and share.item() == pytest.approx(1 - 8 * 10 / (20 * 24))


@pytest.mark.parametrize("off", ["mixup_alpha", "cutmix_alpha"])
def test_an_unreadable_image_is_mixed_into_no_other(off):
    weight = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0])  # the partner of 1 is 4
    mixed, targets = mix(3, **{off: 0.0})
    found, soft = mix(3, weight, **{off: 0.0})
    others = [0, 1, 2, 3, 5]
    assert torch.equal(found[others], mixed[others]) and torch.equal(soft[others], targets[others])
    assert torch.equal(found[4], images()[4]) and torch.equal(soft[4], TARGETS[4])
    assert not torch.equal(mixed[4], images()[4])
    last = images().contiguous(memory_format=torch.channels_last)
    assert make(**{off: 0.0})(last, TARGETS, weight)[0].stride() == last.stride()


def test_probabilities_are_those_given_and_evaluation_mixes_nothing():
    assert 180 < sum(torch.equal(mix(seed, mix_probability=0.3)[0], images()) for seed in range(300)) < 240
    kinds = [mix(seed) for seed in range(300)]
    assert 120 < sum(bool(((found == images()) | (found == images().flip(0))).all()) for found, _ in kinds) < 180
    for still in (make(mix_probability=0.0), make(mixup_alpha=0.0, cutmix_alpha=0.0), make().eval()):
        plain, targets = still(images(), TARGETS, ONES)
        assert not still.is_on and torch.equal(plain, images()) and torch.equal(targets, TARGETS)
