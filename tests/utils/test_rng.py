"""Random numbers as functions of counters: literal tables, properties, equality for any batch split."""

import pytest
import torch

from utils import rng

# --- hashes

# Changing one of these changes every run: saved ones no longer resume to the same samples.
KNOWN = {
    (): 5700357409661599242,
    (0,): 6467540162864785327,
    (1,): 8702843941935282423,
    (0, 0): 3828582881644381438,
    (0, 1): 185151156520619842,
    (1, 0): 866938649145782109,
    (-1,): 6832720693624013390,
    (3, 1, 4, 1, 5): 4166843669786820992,
    (7, 10**9, 0): 2448313011511004704,
}


def test_known_hashes():
    assert {counters: rng.hash_counters(*counters) for counters in KNOWN} == KNOWN
    assert rng.sample_key(7, 10**9) == KNOWN[7, 10**9, 0]


# seed, stream, count: the first members. Up to 256 members, the order is that of `permutation`.
ORDERS = {
    (0, 0, 8): [2, 0, 5, 7, 3, 6, 4, 1],
    (0, 1, 8): [1, 3, 5, 7, 4, 2, 6, 0],
    (1, 0, 8): [5, 4, 6, 3, 0, 2, 7, 1],
    (0, 0, 257): [233, 161, 99, 48, 145, 55, 121, 229],
    (0, 0, 1000): [338, 587, 195, 112, 684, 38, 23, 607],
    (0, 0, 10**8): [66733093, 45233334, 54600747, 66218588],
}


@pytest.mark.parametrize("case, first", ORDERS.items())
def test_known_orders(case, first):
    order = rng.Permutation(*case)
    assert [order(index) for index in range(len(first))] == first


# --- generators


def test_seeded_draws_as_a_generator_of_its_own_would():
    with rng.seeded(123):
        inside = torch.rand(5)
    assert torch.equal(inside, torch.rand(5, generator=torch.Generator().manual_seed(123)))


def test_seeded_gives_the_global_state_back_after_an_error_too():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with rng.seeded(1):
        torch.rand(7)
    with pytest.raises(ZeroDivisionError), rng.seeded(2):
        torch.rand(7)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


# --- permutations without a table


@pytest.mark.parametrize("count", [1, 2, 256, 257, 1000, 4096, 4097, 54_653])
def test_a_keyed_permutation_takes_each_member_once(count):
    order = rng.Permutation(3, 4, count)
    found = [order(index) for index in range(count)]
    assert sorted(found) == list(range(count)) and (count < 3 or found != list(range(count)))


# --- numbers from keys, on the keys' device

KEYS = torch.tensor([rng.sample_key(0, position) for position in range(2000)])


def test_uniform_numbers_are_uniform():
    numbers = rng.uniform(KEYS, (50,)).flatten()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    expected = len(numbers) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared of 19 degrees of freedom: p = 1e-4
    assert len(torch.unique(numbers)) > 0.99 * len(numbers)


@pytest.mark.parametrize("size", [50, 51])
def test_normal_numbers_are_normal_and_independent(size):
    numbers = rng.normal(KEYS, (size,)).double()
    flat = numbers.flatten()
    assert not torch.equal(numbers, rng.normal(KEYS, (size,), draw=1).double())
    assert flat.isfinite().all() and abs(flat.mean()) < 0.013 and abs(flat.var() - 1) < 0.02
    assert abs((flat**4).mean() - 3) < 0.12
    correlation = torch.corrcoef(numbers.T)
    assert (correlation - torch.eye(size, dtype=torch.float64)).abs().max() < 0.12  # 5 standard deviations


def test_no_key_gives_an_infinite_number():
    assert rng.normal(torch.tensor([0, 1, 2**63 - 1, 2**32 - 1, 2**32, 2**62]), (1000,)).isfinite().all()
