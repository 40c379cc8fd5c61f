"""The endless stream: position -> sample, a pure function.

Epochs are concatenated orders; there is no partial batch, an epoch boundary is a position, and resuming is a matter of
starting at another position. Nothing depends on the number of ranks, workers or micro-batches: step t of a run takes
positions [t * G, (t + 1) * G), of which every rank takes an equal, contiguous share.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from utils import rng
from utils.errors import UserError


class Draw(NamedTuple):
    """One sample at one position: its row, its random key, and the shape group it belongs to."""

    position: int
    index: int
    key: int
    group: int = 0


class Sampler(Protocol):
    """An order of samples. `chunk` is None where neighbours need not have one shape."""

    epoch_length: int
    chunk: int | None

    def at(self, position: int) -> tuple[int, int]:
        """Return (row, group) at a position."""
        ...


class _EpochSampler:
    """Keep the order of the epoch that was asked for last; subclasses make an epoch's order."""

    chunk: int | None = None

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        if len(rows) == 0:
            raise UserError("data.root: no sample is left to train on; see the collection's splits and labels")
        self.rows, self.seed = rows, seed
        self.epoch_length = len(rows)
        self._epoch = -1
        self._order: np.ndarray = rows[:0]

    def _make_order(self, epoch: int) -> np.ndarray:
        """Return an epoch's indices into `rows`."""
        raise NotImplementedError

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._make_order(epoch)
        return int(self._order[offset])

    def at(self, position: int) -> tuple[int, int]:
        """Return (row, 0)."""
        return int(self.rows[self._index(position)]), 0


class ShuffledSampler(_EpochSampler):
    """Every sample once per epoch, in an order of its own each epoch."""

    def _make_order(self, epoch: int) -> np.ndarray:
        return rng.permutation(self.seed, epoch, len(self.rows))


class BalancedSampler(_EpochSampler):
    """Every class equally often; within a class its samples in turn, in an order of its own each time round.

    An epoch has as many positions as there are samples, so samples of small classes come several times in it (with an
    augmentation of their own each time) and not all of the large classes do.
    """

    def __init__(self, rows: np.ndarray, class_ids: np.ndarray, seed: int) -> None:
        super().__init__(rows, seed)
        order = np.argsort(class_ids, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(class_ids[order])) + 1)

    def _make_order(self, epoch: int) -> np.ndarray:
        classes = len(self._members)
        rounds, extra = divmod(self.epoch_length, classes)
        # The `extra` classes that come once more are the next ones in turn, so that a class's turns have no gap.
        given = epoch * extra
        picks = np.empty((rounds + 1, classes), dtype=np.int64)
        for number, members in enumerate(self._members):
            turns = epoch * rounds + (given + classes - 1 - number) // classes + np.arange(rounds + 1)
            laps = [
                rng.permutation(self.seed, rng.hash_counters(number, int(lap)), len(members))
                for lap in range(turns[0] // len(members), turns[-1] // len(members) + 1)
            ]
            flat = np.concatenate(laps)
            picks[:, number] = members[flat[turns - turns[0] // len(members) * len(members)]]
        order = [
            picks[turn, rng.permutation(self.seed, rng.hash_counters(epoch, turn, 1), classes)]
            for turn in range(rounds)
        ]
        last = (given + rng.permutation(self.seed, rng.hash_counters(epoch, rounds, 1), extra)) % classes
        return np.concatenate([*order, picks[rounds, last]])


class GroupedSampler(_EpochSampler):
    """Samples in chunks of one group (one shape) and fixed size, the chunks in a random order.

    A group that does not fill its last chunk fills it with its first samples of the epoch again: at most chunk - 1
    positions per group and epoch repeat a sample, none is left out.
    """

    def __init__(self, rows: np.ndarray, groups: np.ndarray, chunk: int, seed: int) -> None:
        super().__init__(rows, seed)
        self.chunk = chunk
        self._groups = groups
        self._members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self.epoch_length = sum(-(-len(members) // chunk) * chunk for members in self._members)

    def _make_order(self, epoch: int) -> np.ndarray:
        chunks = []
        for number, members in enumerate(self._members):
            order = members[rng.permutation(self.seed, rng.hash_counters(epoch, number), len(members))]
            filled = np.resize(order, -(-len(order) // self.chunk) * self.chunk)
            chunks.append(filled.reshape(-1, self.chunk))
        table = np.concatenate(chunks)
        return table[rng.permutation(self.seed, rng.hash_counters(epoch, -1), len(table))].ravel()

    def at(self, position: int) -> tuple[int, int]:
        """Return (row, group)."""
        index = self._index(position)
        return int(self.rows[index]), int(self._groups[index])


class RankBatches:
    """The micro-batches of one rank from a step on, without end: lists of draws for the loader."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
    ) -> None:
        self._sampler, self._seed, self._start_step = sampler, seed, start_step
        self._global, self._micro = global_batch_size, micro_batch_size
        self._share = global_batch_size // world_size
        self._rank = rank

    def draw(self, position: int) -> Draw:
        """Return what is read at a position."""
        index, group = self._sampler.at(position)
        return Draw(position, index, rng.sample_key(self._seed, position), group)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield micro-batches in the order in which train_step takes them."""
        step = self._start_step
        while True:
            first = step * self._global + self._rank * self._share
            for start in range(first, first + self._share, self._micro):
                yield [self.draw(position) for position in range(start, start + self._micro)]
            step += 1


class EvaluationBatches:
    """A rank's share of some rows, each exactly once: all ranks make as many batches, the last padded.

    Padding repeats a row with `position` -1, which the reader turns into weight 0. A row's key depends on the row
    alone, so that masks and noise of an evaluation are the same at every step and on any number of ranks.
    """

    def __init__(self, rows: np.ndarray, *, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        if len(rows) == 0:
            raise UserError("data.root: the validation split is empty; add one or set data.validation_fraction")
        self._rows, self._seed, self._batch_size = rows, seed, batch_size
        self._mine = list(range(rank, len(rows), world_size))
        self._count = -(-len(range(0, len(rows), world_size)) // batch_size)

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return self._count

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches."""
        for number in range(self._count):
            mine = self._mine[number * self._batch_size : (number + 1) * self._batch_size]
            draws = [
                Draw(place, int(self._rows[place]), rng.sample_key(self._seed, int(self._rows[place]), 1))
                for place in mine
            ]
            filler = Draw(-1, int(self._rows[0]), 0)
            yield draws + [filler] * (min(self._batch_size, len(self._rows)) - len(draws))
