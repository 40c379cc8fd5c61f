"""The figures of a tagger: equal to scikit-learn's for any split into batches and two ranks."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from engine.measures import tags
from engine.measures.tag_scores import PROBS, TagScores, calibrate, is_fitted, lower_bound
from engine.measures.tags import BINS, TagHistograms
from utils.formats.thresholds import CATEGORY_PROFILES, OVERALL, PER_TAG
from utils.formats.vocabulary import Vocabulary
from utils.ranks import distributed

IMAGES, TAGS = 900, 40
GENERATOR = torch.Generator().manual_seed(0)
PRIORS = torch.linspace(-5.5, 1, TAGS)
LATENT = PRIORS + 1.5 * torch.randn(IMAGES, TAGS, generator=GENERATOR)
TARGETS = (torch.rand(IMAGES, TAGS, generator=GENERATOR) < LATENT.sigmoid()).float()
TARGETS[:, 3] = 0  # a tag without positives
LOGITS = 2 * LATENT + 0.5 + 0.5 * torch.randn(IMAGES, TAGS, generator=GENERATOR)  # too confident
VALID = torch.rand(IMAGES, generator=GENERATOR) > 0.1
KNOWN = torch.ones(IMAGES, TAGS, dtype=torch.bool)
KNOWN[:, :4] = (torch.rand(IMAGES, generator=GENERATOR) > 0.3)[:, None]  # ratings
MASKED = TARGETS.masked_fill(~KNOWN, torch.nan)
CATEGORIES = (9,) * 4 + (0,) * 26 + (4,) * 10
COUNTS = tuple(int(20000 * share) for share in TARGETS.mean(0))
VOCABULARY = Vocabulary(tuple(f"tag_{i}" for i in range(TAGS)), CATEGORIES, COUNTS, tuple(range(TAGS)))
SPLITS = [[IMAGES], [1, 300, 599]]
SCORED = np.arange(TAGS) != 3


def logit(prob):
    return np.log(prob / (1 - prob))


def fill(split=SPLITS[0], rows=slice(None), logits=LOGITS):
    measure = TagHistograms(TAGS)
    for batch in zip(*(column[rows].split(split) for column in (logits, MASKED, VALID))):
        measure.add(*batch)
    return measure


def columns():
    """Yield (targets, logits) of each tag's samples."""
    for tag in range(TAGS):
        used = VALID & KNOWN[:, tag]
        yield TARGETS[used, tag].numpy(), LOGITS[used, tag].numpy()


@pytest.fixture(scope="module")
def scores():
    return TagScores(fill().reduce(), VOCABULARY)


def exact_ap():
    return np.array([metrics.average_precision_score(*column) for column, some in zip(columns(), SCORED) if some])


@pytest.mark.parametrize("split", SPLITS)
def test_average_precision_is_scikit_learns(split):
    found = fill(split).reduce().average_precision()
    assert np.abs(found[SCORED] - exact_ap()).max() < 5e-4 and np.isnan(found[3])


def test_average_precision_of_equal_logits_is_that_of_one_threshold(monkeypatch):
    coarse = (LOGITS / 4).round()  # all that is kept is a run of equal logits, partly kept
    kept = fill(logits=torch.where(LOGITS > 1e9, LOGITS, coarse)).reduce().average_precision()
    monkeypatch.setattr(tags, "_UNBINNED", 1000)  # more than there are images: exact
    whole = fill(logits=coarse).reduce().average_precision()
    exact = [metrics.average_precision_score(truth, (logits / 4).round()) for truth, logits in columns() if truth.any()]
    assert whole[SCORED] == pytest.approx(exact, abs=1e-9)
    assert np.abs(kept - whole)[SCORED].max() < 0.1  # the convention of ties alone differs


@pytest.mark.parametrize("shift, spread", [(-9, 1.0), (-7, 0.1), (0, 0.2)])
def test_average_precision_of_rare_tags_among_many_images(shift, spread):
    images, number = 50_000, 40
    logits = shift + spread * torch.randn(images, number, generator=GENERATOR)
    targets = torch.zeros(images, number)
    for tag in range(number):
        targets[: 1 + tag // 2, tag] = 1
    logits += 4 * spread * targets
    measure = TagHistograms(number)
    measure.add(logits, targets, torch.ones(images, dtype=torch.bool))
    exact = [metrics.average_precision_score(targets[:, tag], logits[:, tag]) for tag in range(number)]
    assert 0.2 < np.mean(exact) < 0.9
    assert np.abs(measure.reduce().average_precision() - exact).max() < 1e-3


def test_scalars(scores):
    """Of all tags but the four ratings."""
    found, probs = scores.scalars(), [(truth, 1 / (1 + np.exp(-logits))) for truth, logits in [*columns()][4:]]
    scored = [pair for pair in probs if pair[0].any()]
    assert found["mAP"] == pytest.approx(exact_ap()[3:].mean(), abs=1e-4)
    assert (found["tags"], found["tags_without_positives"]) == (TAGS - 4, 0)
    assert found["support"] == sum(truth.sum() for truth, _ in probs)
    for average, pairs in (("micro", [tuple(np.concatenate(column) for column in zip(*probs))]), ("macro", scored)):
        for name, threshold in ((f"{average}_f1_at_0.35", 0.35), (f"{average}_f1", found[f"{average}_pr_threshold"])):
            exact = np.mean([metrics.f1_score(truth, prob >= threshold) for truth, prob in pairs])
            assert found[name] == pytest.approx(exact)
        precision, recall = (
            np.mean([score(truth, prob >= threshold, zero_division=0) for truth, prob in pairs])
            for score in (metrics.precision_score, metrics.recall_score)
        )
        assert precision == pytest.approx(recall, abs=0.005)


def test_tables(scores):
    tables = scores.tables()
    groups = {row["group"]: row for row in tables["tag_groups"]}
    assert sum(groups[name]["support"] for name in ("general", "character")) == groups["all"]["support"]
    assert groups["character"]["mAP"] == pytest.approx(np.nanmean(scores.ap[30:]))
    row = tables["tags"][20]
    assert row["best_f1"] == pytest.approx(2 / (1 / row["precision"] + 1 / row["recall"]))
    (row,) = [row for row in tables["decisions"] if (row["group"], row["threshold"]) == ("all", 0.35)]
    assert row["f1"] == pytest.approx(groups["all"]["micro_f1_at_0.35"])


@pytest.mark.parametrize("is_rank", [True, False])
def test_two_ranks_and_two_joined_parts_equal_the_whole(is_rank, monkeypatch):
    whole, first, second = fill().reduce(), fill([450], slice(450)), fill([225] * 2, slice(450, None))
    if is_rank:
        theirs = {torch.float32: second._scores, torch.bool: second._hits}
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda counts: counts + second._counts)
        monkeypatch.setattr(distributed, "gather_rows", lambda own: torch.cat([own, theirs[own.dtype]]))
        both = first.reduce()
    else:
        both = first.reduce().join(second.reduce())
    assert torch.equal(both.histograms, whole.histograms) and torch.equal(both.scores, whole.scores)
    assert np.array_equal(both.average_precision(), whole.average_precision(), equal_nan=True)


def test_what_is_not_finite_or_not_valid():
    measure, logits = TagHistograms(TAGS), LOGITS.clone()
    logits[~VALID] = torch.nan
    logits[VALID.nonzero()[0], 5:8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    measure.add(logits, TARGETS, VALID)
    found = measure.reduce()
    assert (found.histograms.sum((1, 2)) == VALID.sum()).all()
    assert [found.histograms[tag, :, place].sum() for tag, place in ((5, 0), (6, BINS - 1), (7, 0))] == [1, 1, 1]
    assert np.isfinite(found.average_precision()[SCORED]).all()


# ------------------------------------------------------------------------------------------------------- thresholds


@pytest.fixture(scope="module")
def halves():
    fit, parts = is_fitted(torch.arange(IMAGES)), []
    assert torch.equal(is_fitted(torch.tensor([7, 7, 3])), fit[[7, 7, 3]]) and 0.4 < fit.float().mean() < 0.6
    for chosen in (fit, ~fit):
        measure = TagHistograms(TAGS)
        measure.add(LOGITS, MASKED, VALID & chosen)
        parts.append(TagScores(measure.reduce(), VOCABULARY))
    return parts


def by_category(*parts, precision=0.8, recall=0.9):
    """Return the rows of the categories and of all tags."""
    rows = calibrate(*parts, precision=precision, recall=recall).rows
    return {(row.profile, row.category): row for row in rows if row.profile != PER_TAG}


def test_profiles_meet_their_targets_on_the_images_of_the_fit(halves):
    rows = by_category(halves[0], halves[0])
    assert set(rows) == {(profile, number) for profile in CATEGORY_PROFILES for number in (0, 4, 9, OVERALL)}
    for number in (0, 4, OVERALL):
        balanced, precise, complete, best = (rows[profile, number] for profile in CATEGORY_PROFILES)
        assert abs(balanced.precision - balanced.recall) < 0.02
        assert precise.threshold > balanced.threshold > complete.threshold
        assert 0.8 <= precise.precision < 0.9 and 0.9 <= complete.recall < 0.96
        assert balanced.note is precise.note is complete.note is best.note is None
        assert best.f1 >= max(balanced.f1, precise.f1, complete.f1)
        assert lower_bound(precise.precision, IMAGES) > 0.78


def test_a_category_with_few_positives_takes_the_threshold_of_all_tags_and_says_so(halves, log):
    """10 of 10 is at least 0.787 with 95 % confidence."""
    assert [lower_bound(1.0, 10), lower_bound(0.5, 64)] == pytest.approx([0.787, 0.3993], abs=5e-4)
    rows = by_category(*halves)
    for profile in CATEGORY_PROFILES:
        rare, overall = rows[profile, 9], rows[profile, OVERALL]
        assert rare.threshold == overall.threshold and "9 positives" in rare.note and overall.note is None
        assert f"{profile} of rating: 9 positives" in log.text
    few = TagScores(fill([20], slice(20)).reduce(), VOCABULARY)
    assert all("positives on 1" in row.note for row in by_category(few, few, precision=0.9, recall=0.95).values())
    assert "is not reached" in by_category(*halves, precision=0.99)["high_precision", 0].note


def test_thresholds_are_measured_on_other_images(halves):
    table = calibrate(*halves, precision=0.8, recall=0.9)
    balanced, rows = table.of_categories("balanced"), [row for row in table.rows if row.profile == PER_TAG]
    used = VALID & ~is_fitted(torch.arange(IMAGES))
    for tag in (10, 35):
        decided = LOGITS[used, tag].sigmoid() >= rows[tag].threshold
        assert rows[tag].f1 == pytest.approx(metrics.f1_score(TARGETS[used, tag], decided), abs=1e-5)
        support, best, category = halves[0].support[tag], PROBS[halves[0].best_edge[tag]], balanced[CATEGORIES[tag]]
        expected = (support * logit(best) + 50 * logit(category)) / (support + 50)
        assert expected - 0.016 < logit(rows[tag].threshold) < expected + 1e-3
    assert (rows[3].support, rows[3].f1, rows[3].threshold) == (0, None, balanced[9])
    general = next(row for row in table.rows if row.category == 0)
    truth, decided = TARGETS[used, 4:30].flatten(), LOGITS[used, 4:30].sigmoid().flatten() >= general.threshold
    assert general.f1 == pytest.approx(metrics.f1_score(truth, decided), abs=1e-5)
