"""The stream at the size of a cluster: 1,024 ranks and a collection of 100 million rows, in one process."""

from itertools import islice

import numpy as np
import pytest

from data.stream import Policy, ShuffledSampler, count_batches, evaluation_batches, train_batches
from utils import rng

ROWS, RANKS, GLOBAL_BATCH = 100_000_000, 1024, 8192


def draws_of_step(step, ranks, micro_batch_size):
    """Return the draws of each rank in a step, its micro-batches one after another."""
    sampler = ShuffledSampler(range(ROWS), seed=3)
    found = []
    for rank in range(ranks):
        batches = train_batches(sampler, Policy(3, GLOBAL_BATCH, micro_batch_size, rank, ranks), step)
        share = GLOBAL_BATCH // ranks
        found.append([draw for batch in islice(batches, share // micro_batch_size) for draw in batch])
    return found


@pytest.mark.parametrize("step", [0, 1, ROWS // GLOBAL_BATCH, 10**7])
def test_a_step_is_shared_by_all_ranks_and_is_that_of_any_number_of_them(step):
    """Every position once; 64 ranks with other micro-batches take the same samples with the same keys."""
    shares = draws_of_step(step, RANKS, 8)
    assert {len(share) for share in shares} == {GLOBAL_BATCH // RANKS}
    draws = [draw for share in shares for draw in share]
    assert [draw.position for draw in draws] == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
    assert draws == [draw for share in draws_of_step(step, 64, 32) for draw in share]
    assert all(0 <= draw.index < ROWS for draw in draws)
    if (step + 1) * GLOBAL_BATCH <= ROWS:  # within one epoch
        assert len({draw.index for draw in draws}) == GLOBAL_BATCH


def test_an_order_of_100_million_rows_takes_no_table():
    """It is a permutation (it can be inverted by trying: no two of many positions meet), and starts at once."""
    order = rng.Permutation(7, 0, ROWS)
    places = np.linspace(0, ROWS - 1, 20_000).astype(int)
    found = {order(int(place)) for place in places}
    assert len(found) == len(places) and min(found) >= 0 and max(found) < ROWS
    # The rows of neighbouring positions are spread over the whole collection.
    near = np.sort([order(place) for place in range(1000)])
    assert near[0] < ROWS // 50 and near[-1] > ROWS - ROWS // 50 and np.median(near) == pytest.approx(ROWS / 2, rel=0.2)


def test_an_evaluation_of_100_million_rows_is_shared_without_a_row_twice():
    """All ranks have as many batches; the shares are disjoint and together the whole."""
    policies = [Policy(0, RANKS * 256, 256, rank, RANKS) for rank in range(RANKS)]
    assert {count_batches(range(ROWS - 5), policy) for policy in policies} == {382}  # of 97,657 rows at most
    first = [next(evaluation_batches(range(ROWS - 5), policy)) for policy in policies]
    assert all(draw.position % RANKS == rank for rank, batch in enumerate(first) for draw in batch)
    assert [draw.index for draw in first[1][:3]] == [1, 1 + RANKS, 1 + 2 * RANKS]
    assert all(len(batch) == 256 for batch in first)
