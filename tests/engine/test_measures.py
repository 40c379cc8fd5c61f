"""Measures. Equal to a plain computation over all samples for any split into batches.

That `add` never waits for the device: test_fake_cuda.py.

Their equality over ranks is tested with whole runs: test_exactness.py, test_classification_report.py, test_probe.py.
"""

import numpy as np
import pytest
import torch

from engine.measures.means import Means
from engine.measures.top_samples import TopSamples
from tests.support import refuses

SAMPLES, CLASSES = 60, 5
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randperm(SAMPLES, generator=GENERATOR)
LOSSES = torch.randn(SAMPLES, generator=GENERATOR)
LABELS = torch.arange(SAMPLES) % CLASSES
PREDICTED = torch.randint(0, CLASSES, (SAMPLES,), generator=GENERATOR)
SCORES = torch.randint(0, 9, (SAMPLES,), generator=GENERATOR).float()  # with ties
VALID = torch.rand(SAMPLES, generator=GENERATOR) > 0.3
FEATURES = torch.randn(SAMPLES, 8, generator=GENERATOR) + 2 * torch.nn.functional.one_hot(LABELS, 8)
SPLITS = [[1] * SAMPLES, [7, 20, 1, 32]]


def batches(split, *columns):
    return zip(*(column.split(split) for column in columns))


def fill_means(split):
    measure = Means()
    for loss, hit, valid in batches(split, LOSSES, LABELS == PREDICTED, VALID):
        measure.add({"loss": torch.where(valid, loss, torch.nan), "top1": hit}, valid)
    return measure


def fill_top(split):
    measure = TopSamples(6)
    for score, valid, ids, images in batches(split, SCORES, VALID, IDS, FEATURES):
        measure.add(score, valid, {"sample_id": ids, "images": images})
    return measure


@pytest.mark.parametrize("split", SPLITS)
def test_means_ignore_what_is_not_valid_even_where_it_is_nan(split):
    found = fill_means(split).reduce()
    assert found["loss"] == pytest.approx(LOSSES[VALID].double().mean().item(), rel=1e-12)
    assert found["top1"] == (LABELS == PREDICTED)[VALID].double().mean().item()
    assert found["samples"] == VALID.sum()


def test_means_of_nothing_are_an_error():
    measure = Means()
    measure.add({"loss": LOSSES}, torch.zeros(SAMPLES, dtype=torch.bool))
    with refuses(r"^data\.root: no image of the validation split could be read"):
        measure.reduce()


@pytest.mark.parametrize("split", SPLITS)
def test_top_samples_are_the_first_of_a_sort_by_score_then_id(split):
    found = fill_top(split).reduce()
    order = sorted(torch.nonzero(VALID).flatten().tolist(), key=lambda row: (-SCORES[row], IDS[row]))[:6]
    assert found["sample_id"].tolist() == IDS[order].tolist()
    assert np.array_equal(found["images"], FEATURES[order].numpy())


def test_top_samples_of_several_sizes_get_white_edges():
    measure = TopSamples(2)
    for number, size_hw in enumerate([(2, 3), (4, 1), (1, 1)]):
        images = torch.full((1, 3, *size_hw), 7, dtype=torch.uint8)
        sample = torch.tensor([number])
        measure.add(-sample.float(), sample >= 0, {"sample_id": sample, "images": images})
    first, second = measure.reduce()["images"][:, 0]
    assert first.tolist() == [[7, 7, 7]] * 2 + [[255] * 3] * 2 and second.tolist() == [[7, 255, 255]] * 4
