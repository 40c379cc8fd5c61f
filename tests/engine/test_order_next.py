"""Which images to label next, by frozen features."""

import torch
from torch.nn import functional as F

from engine.frozen.order import order_next, predict_classes

NONE = torch.zeros(0, dtype=torch.long)


def find_next(features, labelled, labels, count):
    return order_next(features, labelled, predict_classes(features, labelled, labels)[0], count)


def draw_groups(sizes, apart=0.3):
    """Return features [N, 32] of groups of images around centres, and the group of each image [N]."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.randn(len(sizes), 32, generator=generator)
    return centres[groups] + apart * torch.randn(len(groups), 32, generator=generator), groups


def test_the_first_images_are_of_different_groups_and_the_very_first_of_a_large_one():
    features, groups = draw_groups([80, 80, 10, 10, 10])
    first = groups[find_next(features, NONE, NONE, 5)].tolist()
    assert sorted(first) == [0, 1, 2, 3, 4] and first[0] < 2


def test_copies_of_taken_and_of_labelled_images_come_last():
    features, _ = draw_groups([10, 10, 10], apart=1.0)
    order = find_next(torch.cat([features, 1.001 * features]), torch.tensor([0, 1]), torch.tensor([0, 1]), 100)
    assert sorted(order) == sorted(set(range(60)) - {0, 1})  # fewer than asked for; none twice, none with a label
    assert len({row % 30 for row in order[:28]} - {0, 1}) == 28


def test_images_between_two_classes_are_doubtful_and_come_first():
    features, groups = draw_groups([60, 60])
    middle = F.normalize(features, dim=1)[groups == 0].mean(dim=0) + F.normalize(features, dim=1)[groups == 1].mean(
        dim=0
    )
    features = torch.cat([features, (middle + 0.05 * torch.randn(10, 32, generator=torch.Generator().manual_seed(1)))])
    labelled = torch.tensor([0, 1, 2, 3, 4, 60, 61, 62, 63, 64])
    assert find_next(features, labelled, groups[labelled], 1)[0] >= 120


def test_fewer_labels_are_needed_than_in_random_order():
    features, groups = draw_groups([200, 60, 30, 15, 8])
    found = len(groups[torch.tensor(find_next(features, NONE, NONE, 8))].unique())
    generator = torch.Generator().manual_seed(0)
    random = [len(groups[torch.randperm(len(groups), generator=generator)[:8]].unique()) for _ in range(50)]
    assert found == 5 and sum(random) / 50 < 4
