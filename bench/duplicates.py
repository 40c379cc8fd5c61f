"""The search for near-duplicates among made hashes, and for crops among made thumbnails.

python bench/duplicates.py [IMAGES]

Four of five hashes are random; each fifth is another's with up to 4 bits changed, half of these mirrored. Four of five
thumbnails are sums of random waves, weaker the shorter they are; each fifth shows 80 to 100 % of each side of another,
half of these mirrored, with noise. Reported are the seconds, and the share of the made duplicates that are in the group
of the image they were made from.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data.crops import find_crops
from data.duplicates import SIDE_PX, group_duplicates

ODD = 0x5555555555555555  # the bits that a mirror changes
WAVES, CHUNK = 16, 8192


def choose_sources(count: int, generator: np.random.Generator) -> np.ndarray:
    """Return the row that each is made from, int64 [N]: its own, or for each fifth another's."""
    rows = np.arange(count)
    return np.where(rows % 5 == 4, generator.integers(0, count // 5, count) * 5, rows)


def make_hashes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes, int64 [N], and the row that each was made from, int64 [N]."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63 - 1, count)
    sources = choose_sources(count, generator)
    changed = np.bitwise_xor.reduce(np.int64(1) << generator.integers(0, 63, (count, 4)), axis=1)
    mirrored = np.where(generator.random(count) < 0.5, ODD, 0)
    return np.where(sources != np.arange(count), hashes[sources] ^ changed ^ mirrored, hashes), sources


def make_thumbnails(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return thumbnails, uint8 [N, 32, 32], and the row that each was made from, int64 [N]."""
    generator = np.random.default_rng(0)
    sources = choose_sources(count, generator)
    strengths = generator.standard_normal((count, WAVES, WAVES), np.float32)
    strengths *= 40 / (1 + np.hypot(*np.mgrid[:WAVES, :WAVES]))
    strengths[:, 0, 0] = 0  # the mean
    made = np.empty((count, SIDE_PX, SIDE_PX), np.uint8)
    for at in range(0, count, CHUNK):
        rows = np.arange(at, min(at + CHUNK, count))
        is_part = (sources[rows] != rows)[:, None, None]
        sides = 1 - 0.2 * generator.random((len(rows), 1, 2)) * is_part
        starts = generator.random((len(rows), 1, 2)) * (1 - sides)
        places = starts + sides * ((np.arange(SIDE_PX) + 0.5) / SIDE_PX)[:, None]
        mirrored = (generator.random(len(rows)) < 0.5) & is_part[:, 0, 0]
        places[mirrored, :, 1] = places[mirrored, ::-1, 1]
        down, across = (np.cos(np.pi * places[..., [axis]] * np.arange(WAVES)).astype(np.float32) for axis in (0, 1))
        levels = 128 + down @ strengths[sources[rows]] @ across.transpose(0, 2, 1)
        levels += generator.standard_normal(levels.shape, np.float32) * is_part
        made[rows] = levels.clip(0, 255)
    return made, sources


def report(what: str, started: float, groups: np.ndarray, sources: np.ndarray) -> None:
    """Print the seconds, and the share that was found."""
    seconds = time.perf_counter() - started
    found = (groups == groups[sources])[sources != np.arange(len(sources))].mean()
    print(f"{len(sources):,} {what}: {seconds:.1f} s, {found:.2%} of the made duplicates found")


def main() -> None:
    """Make, group, and report."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    hashes, sources = make_hashes(count)
    started = time.perf_counter()
    report("hashes", started, group_duplicates(hashes), sources)
    thumbnails, sources = make_thumbnails(count)
    started = time.perf_counter()
    pairs = find_crops(thumbnails)
    report("thumbnails", started, group_duplicates(hashes, [pairs]), sources)
    print(f"{(sources[pairs[0]] != sources[pairs[1]]).sum():,} of {len(pairs[0]):,} pairs are false")


if __name__ == "__main__":
    main()
