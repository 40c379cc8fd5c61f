"""Wrong labels are found by what the other images say, and how many there are."""

import torch
from sklearn.metrics import average_precision_score

from engine.frozen.labels import bound_wrong, judge_classes, judge_tags

CLASSES = 6


def draw_images(count, noise=1.0, seed=0):
    """Return features of clouds, one for each class, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    return torch.randn(CLASSES, 24, generator=draw)[labels] + noise * torch.randn(count, 24, generator=draw), labels


def precision(right, is_wrong):
    return average_precision_score(is_wrong, -right)


def test_labels_that_are_wrong_by_chance_come_first():
    features, labels = draw_images(600)
    given = labels.clone()
    given[::10] = (labels[::10] + 1 + torch.arange(60) % (CLASSES - 1)) % CLASSES
    right, _ = judge_classes(features, given)
    assert precision(right, given != labels) > 0.97
    assert abs((1 - right).sum() - 60) < 9


def test_that_certain_classes_are_mistaken_for_certain_others_is_learnt(monkeypatch):
    features, labels = draw_images(900, noise=2.5, seed=1)
    given = labels.where(torch.arange(900) % 6 > 0, (labels + 1) % CLASSES)
    learnt, _ = judge_classes(features, given)
    monkeypatch.setattr("engine.frozen.labels._LEAST_GAIN", torch.inf)
    other, _ = judge_classes(features, given)
    assert precision(learnt, given != labels) > precision(other, given != labels) + 0.04


def test_right_labels_of_images_and_copies_are_not_doubted():
    features, labels = (each[torch.arange(300) // 2] for each in draw_images(150, noise=0.5))
    right, probs = judge_classes(features, labels)
    assert torch.equal(probs.argmax(dim=1), labels) and (1 - right).sum() < 1


def test_features_that_tell_nothing_leave_open_whether_labels_are_wrong():
    features, labels = draw_images(300)
    noise = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    low, high = bound_wrong(judge_classes(noise, labels)[1][:, None], labels[:, None]).values()
    assert low == 0 and high > 150
    tags = labels[:, None] == torch.arange(2)
    assert bound_wrong(judge_tags(features, tags)[1], tags.long())["wrong, at least"] == 0
    labels[:40] = (labels[:40] + 1) % CLASSES
    low, high = bound_wrong(judge_classes(features, labels)[1][:, None], labels[:, None]).values()
    assert 20 < low < 40 < high < 60
