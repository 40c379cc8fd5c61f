"""Exact means of per-sample values."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.contracts import Batch, Figures, Tensors
from utils.errors import UserError
from utils.ranks import distributed


def measure_means(batches: Iterable[Batch], compute: Callable[[Batch], Tensors]) -> Figures:
    """Return `Means.reduce` of the per-sample values [B] that `compute` returns for each batch."""
    means = Means()
    for batch in batches:
        means.add(compute(batch), batch["weight"] > 0)
    return means.reduce()


class Means:
    """Average per-sample values over all valid samples of all ranks, in float64."""

    def __init__(self) -> None:
        self._names = []
        self._sums = 0.0  # [1 + N]: the count, then a sum for each name

    def add(self, values: Tensors, valid: Tensor) -> None:
        """Add a batch: values [B] by name, with the same names each time, and valid [B] bool."""
        self._names = list(values)
        rows = torch.stack(
            [torch.ones_like(valid, dtype=torch.float64), *(value.double() for value in values.values())]
        )
        # Select, do not multiply: the loss of a blank image may be NaN.
        self._sums = self._sums + torch.where(valid, rows, 0.0).sum(dim=1)

    def reduce(self) -> Figures:
        """Return the means by name, and `samples`, the number of valid samples. Raises UserError if it is 0."""
        assert self._names, "no batch was added"
        count, *sums = distributed.all_reduce_sum(self._sums).tolist()
        if count == 0:
            raise UserError("data.root: no image of the validation split could be read; see the warnings above")
        return {name: total / count for name, total in zip(self._names, sums)} | {"samples": count}
