"""How a batch is divided among ranks and micro-batches."""

import math

from utils.errors import UserError


def largest_divisor(count: int, most: int) -> int:
    """Return the largest divisor of `count` up to `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def split_batch(batch_size: int, world_size: int, cap: int, chunk: int | None) -> tuple[int, int]:
    """Return (micro_batch_size, accum_steps): the largest divisor of a rank's share up to `cap`.

    chunk: samples of one shape that follow each other; a micro-batch is within one chunk.
    """
    if batch_size % world_size != 0:
        below = batch_size // world_size * world_size
        allowed = ", ".join(str(size) for size in (below, below + world_size) if size > 0)
        raise UserError(
            f"loop.batch_size: {batch_size} does not divide by the {world_size} ranks; set it to "
            f"{allowed}, or change the number of processes"
        )
    share = batch_size // world_size
    micro = largest_divisor(share if chunk is None else math.gcd(share, chunk), cap)
    return micro, share // micro
