"""The search for near-duplicates among made hashes.

python bench/duplicates.py [IMAGES]

Four of five hashes are random; each fifth is another's with up to 4 bits changed, half of these mirrored. Reported are
the seconds, and the share of the made duplicates that are in the group of the image they were made from.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data.duplicates import group_duplicates

ODD = 0x5555555555555555  # the bits that a mirror changes


def make_hashes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes, int64 [N], and the row that each was made from, int64 [N]."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63 - 1, count)
    rows = np.arange(count)
    copies = rows % 5 == 4
    sources = np.where(copies, generator.integers(0, count // 5, count) * 5, rows)
    changed = np.bitwise_xor.reduce(np.int64(1) << generator.integers(0, 63, (count, 4)), axis=1)
    mirrored = np.where(generator.random(count) < 0.5, ODD, 0)
    return np.where(copies, hashes[sources] ^ changed ^ mirrored, hashes), sources


def main() -> None:
    """Make, group, and report."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    hashes, sources = make_hashes(count)
    started = time.perf_counter()
    groups = group_duplicates(hashes)
    seconds = time.perf_counter() - started
    found = (groups == groups[sources])[sources != np.arange(count)].mean()
    print(f"{count:,} hashes: {seconds:.1f} s, {found:.2%} of the made duplicates found")


if __name__ == "__main__":
    main()
