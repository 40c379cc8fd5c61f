"""The stream. Properties of every sampler, purity of positions, exactness over ranks and micro-batches."""

import itertools
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from data.stream.order import (
    GroupedSampler,
    Sampler,
    Turns,
    build_sampler,
    evaluation_batches,
    plan_batches,
    train_batches,
)
from tests.support import refuses
from utils import rng

# Rows of a collection are no 0..n-1: the other split lies in between.
ROWS = np.arange(3, 3 + 2 * 37, 2)
CLASS_SIZES = [1, 3, 20, 13]
IDS = np.repeat(-1, ROWS[-1] + 1)  # of other splits
IDS[ROWS] = np.random.default_rng(0).permutation(np.repeat(range(len(CLASS_SIZES)), CLASS_SIZES))
GROUPS = np.random.default_rng(1).permutation(np.repeat([0, 2, 5, 9], [1, 8, 13, 15]))
CHUNK = 4
CONCEPTS, POSITIONS = np.repeat([0, 1, 3], [5, 30, 2]), np.array([15, 12, 0, 3])  # three times, a share, none, a share
SAMPLERS = {
    "shuffled": lambda seed: Sampler(ROWS, seed),
    "balanced": lambda seed: build_sampler("balanced", ROWS, labelled("ABCD", IDS), seed),
    "grouped": lambda seed: GroupedSampler(ROWS, GROUPS, CHUNK, seed),
    "concepts": lambda seed: Sampler(ROWS, seed, Turns(CONCEPTS, GROUPS * 0, POSITIONS, seed)),
    "concepts in groups": lambda seed: GroupedSampler(
        ROWS, GROUPS, CHUNK, seed, Turns(CONCEPTS, GROUPS, POSITIONS, seed)
    ),
}


def labelled(names, ids):
    """What `build_sampler` reads of a collection."""
    return SimpleNamespace(class_names=lambda split: names, class_ids=lambda names: np.array(ids), concepts=[])


def epoch_rows(sampler, epoch):
    length = sampler.epoch_length
    return [sampler.at(position)[0] for position in range(epoch * length, (epoch + 1) * length)]


# --- all samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_position_does_not_depend_on_what_was_asked_before(name):
    positions = range(5 * SAMPLERS[name](0).epoch_length + 3)
    in_order = [SAMPLERS[name](0).at(position) for position in positions]
    one = SAMPLERS[name](0)
    for position in random.Random(0).choices(positions, k=1000):
        assert one.at(position) == in_order[position]


@pytest.mark.parametrize("name", SAMPLERS)
def test_epochs_and_seeds_have_orders_of_their_own(name):
    orders = [tuple(epoch_rows(SAMPLERS[name](seed), epoch)) for seed in range(3) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_far_position_is_found_at_once(monkeypatch, name):
    """A run that resumes at its millionth epoch must not build the ones before."""
    sampler, made = SAMPLERS[name](0), []
    permutation = rng.Permutation
    monkeypatch.setattr(rng, "Permutation", lambda *counters: made.append(counters) or permutation(*counters))
    row, group = sampler.at(10**6 * sampler.epoch_length + 1)
    assert type(row) is int and type(group) is int and row in ROWS and 1 <= len(made) <= 3


def test_an_empty_split_is_refused():
    none = np.empty(0, dtype=np.int64)
    for make in (Sampler, lambda *given: GroupedSampler(none, none, 4, 0)):
        with refuses(r"^data\.root: there is no sample"):
            make(none, 0)


# --- shuffled


@pytest.mark.parametrize("count", [1, 2, 4, 5, 37, 60, 64, 1000])
def test_every_epoch_of_a_shuffled_stream_is_a_permutation(count):
    rows = np.arange(count) * 5
    sampler = Sampler(rows, 2**40)
    assert sampler.epoch_length == count and sampler.chunk is None
    for epoch in (0, 1, 999):
        assert sorted(epoch_rows(sampler, epoch)) == rows.tolist()


# --- concepts


@pytest.mark.parametrize("name", ["concepts", "concepts in groups"])
def test_concepts_have_their_positions_and_their_samples_take_turns(name):
    """In chunks, what fills none moves to a later epoch, so the counts are those of a cycle."""
    sampler, cycle = SAMPLERS[name](7), CHUNK if name.endswith("groups") else 1
    length, groups = cycle * sampler.epoch_length, GROUPS if cycle > 1 else GROUPS * 0
    cell_of = dict(zip(ROWS.tolist(), zip(CONCEPTS.tolist(), groups.tolist())))
    total = Counter()
    for start in range(0, 10 * length, length):
        drawn = [sampler.at(position) for position in range(start, start + length)]
        assert Counter(cell_of[row][0] for row, _ in drawn) == {0: 15 * cycle, 1: 12 * cycle, 3: 3 * cycle}
        assert all(cell_of[row][1] == group for row, group in drawn)
        total.update(row for row, _ in drawn)
    assert {total[row] for row in ROWS[:5]} == {3 * 10 * cycle}, "whole repeats are exact"
    for cell in set(cell_of.values()):
        shown = [total[row] for row, own in cell_of.items() if own == cell]
        assert max(shown) - min(shown) <= 1, (cell, shown)


# --- balanced


@pytest.mark.parametrize("sizes", [CLASS_SIZES, [2, 5, 7], [9], [1] * 6, [1, 1, 40]])
def test_classes_occur_equally_often_and_their_samples_take_turns(sizes):
    """An epoch has about as many positions as there are samples, and as many of each class."""
    ids = np.random.default_rng(2).permutation(np.repeat(range(len(sizes)), sizes))
    sampler = build_sampler("balanced", range(len(ids)), labelled([*"ABCDEF"[: len(sizes)]], ids), 0)
    assert abs(sampler.epoch_length - len(ids)) <= len(sizes) / 2
    total = Counter()
    for epoch in range(20):
        rows = epoch_rows(sampler, epoch)
        assert {*Counter(ids[rows].tolist()).values()} == {sampler.epoch_length // len(sizes)}
        total.update(rows)
    for number in range(len(sizes)):
        shown = [total[row] for row in np.flatnonzero(ids == number).tolist()]
        assert max(shown) - min(shown) <= 1


# --- grouped


def test_a_group_carries_what_fills_no_chunk_so_that_its_samples_come_equally_often():
    """From the start to the end of any epoch, their counts differ by at most one; after `chunk` epochs, by none."""
    sampler, counts = SAMPLERS["grouped"](0), Counter()
    assert sampler.chunk == CHUNK and sampler.epoch_length == len(ROWS)
    for cycle in range(3):
        for first, end in itertools.pairwise(sampler.epoch_starts):
            for number in range(cycle * len(ROWS) + first, cycle * len(ROWS) + end):
                drawn = [sampler.at(number * CHUNK + offset) for offset in range(CHUNK)]
                assert len({group for _, group in drawn}) == 1 and {*drawn} <= {*zip(ROWS.tolist(), GROUPS.tolist())}
                counts.update(row for row, _ in drawn)
            for group in set(GROUPS.tolist()):
                shown = [counts[row] for row in ROWS[group == GROUPS].tolist()]
                assert max(shown) - min(shown) <= 1, group
        assert {*counts.values()} == {CHUNK * (cycle + 1)}


def test_a_known_grouped_order():
    """Of the first and of a far cycle."""
    sampler = GroupedSampler(np.arange(7), np.array([0, 0, 0, 1, 1, 2, 2]), 2, 0)
    assert [sampler.at(position) for position in range(14)] == [
        (6, 2), (5, 2), (2, 0), (0, 0), (3, 1), (4, 1), (5, 2), (6, 2), (2, 0), (0, 0), (1, 0), (1, 0), (3, 1), (4, 1),
    ]  # fmt: skip
    far = [sampler.at(position) for position in range(14 * 10**6 + 7, 14 * 10**6 + 14)]
    assert far == [(2, 0), (6, 2), (5, 2), (3, 1), (4, 1), (1, 0), (0, 0)]


# --- ranks and micro-batches

GLOBAL = 24
STEPS = 7


def steps_over_ranks(name, world, micro):
    """Per step, the draws of all ranks in rank order."""
    accum = GLOBAL // world // micro
    found = [[] for _ in range(STEPS)]
    for rank in range(world):
        mine = list(islice(train_batches(SAMPLERS[name](0), GLOBAL, micro, 0, rank, world), accum * STEPS))
        assert all(len(batch) == micro for batch in mine)
        for number, batch in enumerate(mine):
            found[number // accum].extend(batch)
    return found


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks_and_micro_batches(name, world):
    alone = steps_over_ranks(name, 1, GLOBAL)
    positions = [draw.position for step in alone for draw in step]
    assert positions == list(range(GLOBAL * STEPS))
    share = GLOBAL // world
    for micro in [size for size in range(1, share + 1) if share % size == 0]:
        assert steps_over_ranks(name, world, micro) == alone


def test_balanced_needs_labels():
    """Those without would be one class."""
    with refuses(r"^loop.sampling: balanced needs the class of every training image, and 2 of"):
        build_sampler("balanced", np.arange(4), labelled(["A", "B"], [0, -1, 1, -1]), 0)


# --- evaluation


def evaluation(rows, batch_size, world=1, groups=None, seed=0):
    """Return the batches of each rank."""
    made = [list(evaluation_batches(rows, batch_size, seed, groups, rank, world)) for rank in range(world)]
    count = sum(len(starts) for *_, starts in plan_batches(rows, batch_size, groups, world))
    assert {len(each) for each in made} == {count}
    assert len(set(map(len, made))) == 1
    return made


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("count, kinds", [(1, 1), (2, 1), (7, 1), (37, 1), (23, 3)])
def test_evaluation_takes_each_row_once_and_mixes_no_shapes(world, batch_size, count, kinds):
    rows = np.arange(count) * 3 + 1
    groups = np.arange(count) ** 2 % kinds
    made = evaluation(rows, batch_size, world, None if kinds == 1 else groups)
    draws = [draw for each in made for batch in each for draw in batch]
    assert sorted(draw.index for draw in draws if draw.position >= 0) == rows.tolist()
    assert all(rows[draw.position] == draw.index for draw in draws if draw.position >= 0)
    assert {(draw.index, draw.group) for draw in draws} == set(zip(rows.tolist(), groups.tolist()))
    for each in zip(*made):  # the same step on all ranks
        assert len({(draw.group, len(batch)) for batch in each for draw in batch}) == 1
        assert len(each[0]) <= batch_size
    assert kinds > 1 or len({len(batch) for batch in made[0]}) == 1  # nothing is compiled twice


def test_a_rows_key_in_evaluation_depends_on_the_row_alone():
    def keys(rows, world, batch_size):
        batches = [batch for each in evaluation(rows, batch_size, world, seed=5) for batch in each]
        return {draw.index: draw.key for batch in batches for draw in batch if draw.position >= 0}

    alone = keys(np.arange(20), 1, 4)
    assert len(set(alone.values())) == 20
    assert keys(np.arange(20), 3, 7) == alone
    assert keys(np.arange(10, 20), 2, 3) == {row: alone[row] for row in range(10, 20)}
    assert not {rng.sample_key(5, position) for position in range(1000)} & set(alone.values())  # no training key


# --- size
