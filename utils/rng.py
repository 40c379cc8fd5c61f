"""Randomness as a pure function of counters.

Every random choice in training depends on a hash of the seed and the place of use, never on the count of earlier draws.
So a resumed run, and any number of workers or ranks, draw the same numbers.

A *key* is the 63-bit random number of one sample at one position of the stream. A *view* numbers the draws of one
sample (two crops of one image are views 0 and 1).
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_WORD32 = (1 << 32) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB
_TABLE = 256  # of Permutation
_ROUNDS = 6
_NUMPY = np.random.MT19937()  # of `seeded_python`
Words = TypeVar("Words", int, np.ndarray)


def mix64(word: Words) -> Words:
    """Scramble a 64-bit word, or an array of uint64 (the finaliser of SplitMix64).

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 17.
    """
    word = ((word ^ (word >> 30)) * _MIX_A) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_B) & _WORD
    return word ^ (word >> 31)


def hash_counters(*counters: int) -> int:
    """Return a 63-bit hash of integers, whose order matters."""
    word = _GOLDEN
    for counter in counters:
        word = mix64((word + _GOLDEN + mix64((counter + _GOLDEN) & _WORD)) & _WORD)
    return word >> 1


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """Return a random order of 0..count-1 (int64), a function of (seed, stream, count)."""
    words = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash_counters(seed, stream))
    return np.argsort(mix64(words), kind="stable")


class Permutation:
    """A random order of 0..count-1, computed one position at a time without a table.

    A Feistel network permutes 0..2**bits-1, the smallest such range that holds the count. A result beyond the count is
    permuted again until it is below (cycle walking), on average fewer than two times. Up to `_TABLE` members the order
    is a table: a Feistel network on few bits reaches few orders.
    Source: Black, Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 and 4.
    """

    def __init__(self, seed: int, stream: int, count: int) -> None:
        self.count = count
        self._table = permutation(seed, stream, count).tolist() if count <= _TABLE else None
        bits = max(count - 1, 1).bit_length()
        self._low_bits = bits // 2
        self._low = (1 << self._low_bits) - 1
        self._high = (1 << (bits - self._low_bits)) - 1
        self._keys = [hash_counters(seed, stream, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the member at a position, 0 <= index < count."""
        assert 0 <= index < self.count, (index, self.count)
        if self._table is not None:
            return self._table[index]
        index = self._permute(index)
        while index >= self.count:
            index = self._permute(index)
        return index

    def _permute(self, index: int) -> int:
        high = index >> self._low_bits
        low = index & self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= mix64(high ^ key) & self._low
            else:
                high ^= mix64(low ^ key) & self._high
        return high << self._low_bits | low


def sample_key(seed: int, position: int, view: int = 0) -> int:
    """Return the random key of the sample at a position of the stream."""
    return hash_counters(seed, position, view)


def _hash32(word: Tensor) -> Tensor:
    """Scramble 32-bit words in int64 tensors. Both products stay below 2**63, so there is no overflow.

    Source: github.com/skeeto/hash-prospector, the two-round function 16 21f0aaad 15 735a2d97 15.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD32
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD32
    return word ^ (word >> 15)


def _random_words(keys: Tensor, count: int, draw: int) -> Tensor:
    """Return 32-bit random words, int64 [B, count], from keys [B] on their device."""
    low = (keys & _WORD32)[:, None]
    high = (keys >> 32)[:, None]
    salt = hash_counters(draw) & _WORD32
    counter = torch.arange(count, device=keys.device)
    return _hash32((_hash32(_hash32(counter ^ salt) ^ low) + high) & _WORD32)


def uniform(keys: Tensor, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Return float32 [B, *shape], uniform in [0, 1), from keys [B] (int64, a batch's `key`) on their device.

    A sample's numbers depend only on its key and `draw`, not on the batch or the device. Another `draw` gives other
    numbers for the same key. No host synchronisation.
    """
    words = _random_words(keys, math.prod(shape), draw)
    return ((words >> 8).float() * 2.0**-24).view(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Return standard normal numbers, float32 [B, *shape]; like `uniform`, but devices differ by rounding.

    Source: Box, Muller 1958: two uniform numbers give two normal ones.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    first, second = _random_words(keys, 2 * pairs, draw).split(pairs, dim=1)
    radius = (-2.0 * ((first.float() + 1.0) * 2.0**-32).clamp(max=1.0).log()).sqrt()
    angle = second.float() * (2.0 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].reshape(len(keys), *shape)


@contextmanager
def seeded(key: int) -> Iterator[int]:
    """Seed torch's global CPU generator inside the context, and restore its state after it.

    torchvision's v2 transforms take no generator. `default_generator.manual_seed` takes 1 us; `torch.manual_seed` seeds
    every device and takes 65 us.
    """
    yield from seeded_each([key])


def seeded_each(keys: Sequence[int]) -> Iterator[int]:
    """Yield the keys one after another, with torch's global CPU generator seeded with each; restore it at the end."""
    state = torch.default_generator.get_state()
    try:
        for key in keys:
            torch.default_generator.manual_seed(key)
            yield key
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def seeded_python(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators (seed < 2**32) inside the context, and restore them after it.

    NumPy's generator is replaced, which takes 2 us; reading and writing its state takes 50. A second normal number that
    `np.random` keeps for the next call is lost.
    """
    before = random.getstate(), np.random.get_bit_generator()
    random.seed(seed)
    np.random.set_bit_generator(_NUMPY)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_bit_generator(before[1])


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int, device: torch.device) -> None:
    """Seed the generators that the forward pass draws from: drop path, dropout, mixup."""
    key = hash_counters(seed, step, micro_step, rank)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
