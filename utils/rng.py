"""Randomness as a pure function of counters.

Every random choice in training follows from a hash of (seed, where it is used), never from how many numbers were drawn
before. So a resumed run, another number of workers or of ranks, draws the same.

Words: a *key* is the 63-bit random number of one sample at one position of the stream; a *view* counts the draws that
one sample needs (two crops of one image are views 0 and 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


def mix64(word: int) -> int:
    """Scramble a 64-bit word (the finaliser of SplitMix64).

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 17.
    """
    word = ((word ^ (word >> 30)) * _MIX_A) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_B) & _WORD
    return word ^ (word >> 31)


def hash_counters(*counters: int) -> int:
    """Return a 63-bit hash of some integers; their order matters."""
    word = _GOLDEN
    for counter in counters:
        word = mix64((word + _GOLDEN + mix64((counter + _GOLDEN) & _WORD)) & _WORD)
    return word >> 1


def hash_range(seed: int, stream: int, count: int) -> np.ndarray:
    """Return uint64 hashes of (seed, stream, 0..count-1): the keys that a permutation is sorted by."""
    base = np.uint64(hash_counters(seed, stream))
    with np.errstate(over="ignore"):
        word = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + base
        word = (word ^ (word >> np.uint64(30))) * np.uint64(_MIX_A)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(_MIX_B)
    return word ^ (word >> np.uint64(31))


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """Return a random order of 0..count-1 (int64) that depends on nothing but (seed, stream, count)."""
    return np.argsort(hash_range(seed, stream, count), kind="stable")


def sample_key(seed: int, position: int, view: int = 0) -> int:
    """Return the random key of the sample at a position of the stream."""
    return hash_counters(seed, position, view)


def generator_for(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded with a key, for code that takes one."""
    return torch.Generator(device).manual_seed(key)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Run code that draws from torch's global CPU generator as if it had one of its own.

    torchvision's v2 transforms take no generator. `default_generator.manual_seed` costs a microsecond, where
    `torch.manual_seed` would seed every device for 65.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key)
    try:
        yield
    finally:
        generator.set_state(state)


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int, device: torch.device) -> None:
    """Seed what draws on the device inside the forward pass: drop path, dropout, mixup."""
    key = hash_counters(seed, step, micro_step, rank)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
