"""Which tag is given in place of which: counts of any batches, under autocast too, are those of a loop over images."""

import numpy as np
import pytest
import torch

from engine.measures import tag_confusions
from engine.measures.tag_confusions import TagConfusions
from tests.engine.test_no_host_sync import count
from utils.vocabulary import Vocabulary

IMAGES, TAGS = 600, 6
DRAW = np.random.default_rng(0)
TARGETS = (DRAW.random((IMAGES, TAGS)) < 0.4).astype(np.float32)
TARGETS[::7, 0] = np.nan  # not known
PROBS = np.clip(np.nan_to_num(TARGETS) * 0.3 + DRAW.random((IMAGES, TAGS)) * 0.5, 0.01, 0.99)
SIBLINGS = DRAW.random(IMAGES) < 0.3  # have 2, and are given 4
TARGETS[SIBLINGS, 2], TARGETS[SIBLINGS, 4] = 1, 0
PROBS[SIBLINGS, 2], PROBS[SIBLINGS, 4] = 0.2, 0.35
VALID = DRAW.random(IMAGES) < 0.9
VOCABULARY = Vocabulary(tuple("abcdef"), (0,) * TAGS, (5, 6, 7, 1, 8, 9), (0,) * TAGS)
LOGITS = torch.logit(torch.from_numpy(PROBS))


def measure(batch=IMAGES):
    found = TagConfusions(VOCABULARY)
    for rows in torch.arange(IMAGES).split(batch):
        found.add(LOGITS[rows], torch.from_numpy(TARGETS)[rows], torch.from_numpy(VALID)[rows])
    return found


def test_pairs_are_counted_and_ranked_by_their_excess_over_chance():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, again = measure().reduce(), measure(batch=7).reduce()
    assert rows == again and (rows[0]["tag"], rows[0]["given"]) == ("c", "e") and rows[0]["images"] > 100
    expected = {}
    missed, wrong = (TARGETS == 1) & (PROBS < 0.35) & VALID[:, None], (TARGETS == 0) & (PROBS >= 0.35) & VALID[:, None]
    for first in range(TAGS):
        for second in range(TAGS):
            pairs = (missed[:, first] & wrong[:, second]).sum()
            chance = missed[:, first].sum() * wrong[:, second].sum() / VALID.sum()
            if pairs > chance:
                expected["abcdef"[first], "abcdef"[second]] = (pairs, chance, pairs / missed[:, first].sum())
    found = {(row["tag"], row["given"]): (row["images"], row["by_chance"], row["share"]) for row in rows}
    assert found.keys() == expected.keys()
    assert all(found[pair] == pytest.approx(expected[pair]) for pair in found)
    excess = [row["images"] - row["by_chance"] for row in rows]
    assert excess == sorted(excess, reverse=True)


def test_of_a_large_vocabulary_the_most_frequent_tags_are_counted(monkeypatch):
    monkeypatch.setattr(tag_confusions, "_MOST_TAGS", 3)
    rows = measure().reduce()
    assert {row[name] for row in rows for name in ("tag", "given")} <= set("fec")


def test_no_batch_waits_for_the_device():
    found, batch = measure(), (LOGITS[:9], torch.from_numpy(TARGETS[:9]), torch.ones(9, dtype=torch.bool))
    assert count(lambda: found.add(*batch)) == []
