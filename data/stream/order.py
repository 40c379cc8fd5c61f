"""The endless stream of samples: a pure function from position to sample.

Epochs follow each other without a partial batch, and resuming means starting at another position. The order does not
depend on the number of ranks, workers or micro-batches: step t of a run takes positions [t * G, (t + 1) * G), and every
rank takes an equal, contiguous share of them.

The cost of a position does not depend on the size of the collection: orders are keyed permutations (utils/rng.py), not
tables.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from torch import Tensor

from data.collection.collection import Collection
from data.collection.concepts import count_positions, share_out
from utils import rng
from utils.errors import UserError


@lru_cache(maxsize=4096)
def _order(seed: int, stream: int, count: int) -> rng.Permutation:
    """Return a permutation; recent ones are cached."""
    return rng.Permutation(seed, stream, count)


class Draw(NamedTuple):
    """One sample at one position: its row, its random key, and the shape group it belongs to."""

    position: int
    index: int
    key: int
    group: int = 0


# A view of an image: from uint8 [C, H, W] of any size to a tensor with the shape of the draw's group. If it has a
# method `draw`, that makes the numbers of a batch from rows and keys, without pixels, and nothing else is called in a
# worker. If it has a method `on_device`, each batch passes through it on the device, as a part of the update.
View = Callable[[Tensor, Draw], Tensor]
Views = Mapping[str, View]


class Turns:
    """The samples of an epoch's slots, where concepts occur more or less often than once (`count_positions`).

    The slots of a concept are divided over its groups by their samples. The samples of a concept in a group take turns:
    an epoch continues where the previous epoch ended. groups: of each slot, [slots].
    """

    def __init__(self, concepts: ndarray, groups: ndarray, positions: ndarray, seed: int) -> None:
        """Plan the turns. concepts, groups: of each sample, [N]; positions: of each concept in an epoch."""
        shuffled = rng.mix64(np.arange(len(concepts), dtype=np.uint64) + np.uint64(seed))
        self._samples = np.lexsort((shuffled, groups, concepts))
        cells, sizes = np.unique(np.stack([concepts, groups]), axis=1, return_counts=True)
        slots = sum(share_out(sizes * (cells[0] == concept), count) for concept, count in enumerate(positions))
        cell = np.repeat(np.arange(len(slots)), slots)
        self.groups = cells[1][cell]
        self._size = sizes[cell]
        self._slots = slots[cell]
        self._first, self._turn = (np.cumsum(each)[cell] - each[cell] for each in (sizes, slots))
        self._turn = np.arange(len(cell)) - self._turn

    def __call__(self, slot: int, lap: int) -> int:
        """Return the sample of a slot in a lap over all slots."""
        turn = (lap * int(self._slots[slot]) + int(self._turn[slot])) % int(self._size[slot])
        return int(self._samples[self._first[slot] + turn])


class Sampler:
    """An order of rows: every row once per epoch, in another order each epoch. Subclasses define other orders.

    chunk: number of consecutive positions with one shape; None: no groups. turns: how often rows occur.
    """

    chunk: int | None = None

    def __init__(self, rows: Sequence[int], seed: int, turns: Turns | None = None) -> None:
        if len(rows) == 0:
            raise UserError("data.root: there is no sample to train on; check the splits and labels of the collection")
        self.rows = rows
        self.seed = seed
        self.turns = turns
        self.epoch_length = len(rows) if turns is None else len(turns.groups)

    def row_of(self, slot: int, lap: int) -> int:
        """Return the row of a slot; without turns, its index in `rows`."""
        return int(self.rows[slot if self.turns is None else self.turns(slot, lap)])

    def at(self, position: int) -> tuple[int, int]:
        """Return (row, group) at a position."""
        epoch, offset = divmod(position, self.epoch_length)
        return self.row_of(_order(self.seed, epoch, self.epoch_length)(offset), epoch), 0

    def draw(self, position: int) -> Draw:
        """Return the draw of a position."""
        row, group = self.at(position)
        return Draw(position, row, rng.sample_key(self.seed, position), group)


class GroupedSampler(Sampler):
    """Samples in chunks of fixed size with one group (one shape) each; the chunks of an epoch are shuffled.

    The samples of a group come in laps, each in another order. Its chunks are cut from the laps without gaps: samples
    that do not fill a chunk move to a later epoch. So all samples occur equally often: `chunk` times in a cycle of
    `chunk` epochs. groups: [len(rows)]; with turns, those of the slots count.
    """

    def __init__(self, rows: Sequence[int], groups: ndarray, chunk: int, seed: int, turns: Turns | None = None) -> None:
        super().__init__(rows, seed, turns)
        self.chunk = chunk
        groups = groups if turns is None else turns.groups
        self._groups, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
        self._members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
        # Chunks of each group before each epoch of a cycle, [chunk + 1, groups]. The phases spread the chunks of small
        # groups over the epochs; otherwise all would be in the last epoch.
        phases = (np.cumsum(counts) - counts) % chunk
        before = (np.arange(chunk + 1)[:, None] * counts + phases) // chunk
        chunks = np.diff(before, axis=0)  # in each epoch
        # The chunks of a cycle, sorted by epoch and group, as many as there are samples: the group of each, and how
        # many chunks of this group come before it.
        self.epoch_starts = [0, *chunks.sum(axis=1).cumsum().tolist()]
        self._group = np.repeat(np.tile(np.arange(len(counts)), chunk), chunks.ravel())
        firsts = chunks.cumsum().reshape(chunks.shape) - chunks
        self._turn = np.arange(len(self._group)) + np.repeat((before[:-1] - firsts).ravel(), chunks.ravel())

    def at(self, position: int) -> tuple[int, int]:
        """Return (row, group)."""
        number, offset = divmod(position, self.chunk)
        cycle, number = divmod(number, self.epoch_length)
        epoch = bisect_right(self.epoch_starts, number) - 1
        first, end = self.epoch_starts[epoch : epoch + 2]
        index = first + _order(self.seed, rng.hash_counters(cycle, epoch, -1), end - first)(number - first)
        group = int(self._group[index])
        members = self._members[group]
        turn = cycle * len(members) + int(self._turn[index])
        lap, lap_index = divmod(turn * self.chunk + offset, len(members))
        member = members[_order(self.seed, rng.hash_counters(lap, group), len(members))(lap_index)]
        return self.row_of(member, lap), int(self._groups[group])


def build_sampler(
    name: str, rows: Sequence[int], collection: Collection, seed: int, groups: ndarray | None = None, chunk: int = 1
) -> Sampler:
    """Return the sampler for `loop.sampling`, which alone decides how often a position names a row.

    name: shuffled, or balanced: the classes of the training split take equal shares of an epoch, as concepts without
    repeats do; concepts go first. groups, chunk: as in `GroupedSampler`. Balanced sampling raises UserError if an image
    has no label.
    """
    ids = np.zeros(0, int)
    if collection.concepts:
        ids = collection.concept_ids()[rows]
        positions = count_positions(collection.concepts, np.bincount(ids, minlength=len(collection.concepts)))
    elif name == "balanced":
        class_ids = collection.class_ids(collection.class_names("train"))[rows]
        if without := np.count_nonzero(class_ids < 0):
            raise UserError(
                f"loop.sampling: balanced needs the class of every training image, and {without:,} of {len(rows):,} "
                "have none; set loop.sampling=shuffled"
            )
        names, ids = np.unique(class_ids, return_inverse=True)
        positions = np.full(len(names), max(1, round(len(rows) / max(1, len(names)))))
    turns = Turns(ids, np.zeros(len(ids), int) if groups is None else groups, positions, seed) if len(ids) else None
    return Sampler(rows, seed, turns) if groups is None else GroupedSampler(rows, groups, chunk, seed, turns)


def train_batches(
    sampler: Sampler, batch_size: int, micro_batch_size: int, start_step: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[Draw]]:
    """Yield the endless micro-batches of one rank, from `start_step` on; batch_size: over all ranks."""
    count = batch_size // world_size
    for step in itertools.count(start_step):
        first = step * batch_size + rank * count
        for start in range(first, first + count, micro_batch_size):
            yield [sampler.draw(position) for position in range(start, start + micro_batch_size)]


def evaluation_batches(
    rows: Sequence[int], batch_size: int, seed: int, groups: ndarray | None, rank: int = 0, world_size: int = 1
) -> Iterator[list[Draw]]:
    """Yield a rank's share of `rows`, each row exactly once over all ranks. All ranks get the same number of batches.

    groups: the shape group of each row, [len(rows)]. A batch has rows of one group, and the last batch of a group is
    padded. Padding repeats a row with `position` -1 and key 0; the reader gives it weight 0. The key of a row depends
    only on the row, so masks and noise of an evaluation are the same at every step and for any number of ranks.
    """
    for group, positions, starts in plan_batches(rows, batch_size, groups, world_size):
        mine = positions[rank::world_size]
        padding = Draw(-1, int(rows[positions[0]]), 0, group)
        for start in starts:
            chosen = [(int(position), int(rows[position])) for position in mine[start : start + batch_size]]
            draws = [Draw(position, row, rng.sample_key(seed, row, 1), group) for position, row in chosen]
            yield draws + [padding] * (min(batch_size, len(positions)) - len(draws))


def plan_batches(
    rows: Sequence[int], batch_size: int, groups: ndarray | None, world_size: int
) -> Iterator[tuple[int, Sequence[int], range]]:
    """Yield each group, the positions of its rows, and the start of each batch in the largest share of a rank."""
    for group in (0,) if groups is None else np.unique(groups).tolist():
        positions = range(len(rows)) if groups is None else np.flatnonzero(groups == group)
        yield group, positions, range(0, -(-len(positions) // world_size), batch_size)
