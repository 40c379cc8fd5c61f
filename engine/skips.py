"""Steps that were left out because they were not finite: which, on whose samples, and how many are too many.

Nothing is asked of the device between two reports: the last steps' flags, sample ids and losses stay where they are,
as references.

    {"step": 12, "ranks": [1], "what": "loss", "paths": ["cats/a.png"]}     a row of skipped_steps.jsonl
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.step import StepResult
from engine.task import Batch
from utils import distributed
from utils.errors import UserError
from utils.files import AppendFile
from utils.logging import get_logger
from utils.metrics_log import keep_rows

log = get_logger(__name__)

WINDOW_STEPS = 100  # of which `loop.max_skipped_steps` may be left out
_DETAILED = 10  # steps of one report whose samples are listed
_SHOWN = 8  # paths in a message; the file has all


class TooManySkipped(Exception):
    """Ask for a roll-back: more steps were left out than `loop.max_skipped_steps`, the first of them `first`."""

    def __init__(self, first: int, message: str) -> None:
        super().__init__(message)
        self.first, self.message = first, message


@dataclass(frozen=True)
class _Update:
    """What one update, number `step` from 1, leaves on the device: [B] ids, weights, losses for each micro-batch."""

    step: int
    applied: Tensor
    ids: Sequence[Tensor]
    weights: Sequence[Tensor]
    losses: Sequence[Tensor]

    def not_finite(self) -> list[int]:
        """Return the ids of samples whose loss is not finite."""
        found = [
            ids[~torch.isfinite(loss) & (weight > 0)] for ids, weight, loss in zip(self.ids, self.weights, self.losses)
        ]
        return [number for ids in found for number in ids.tolist()]

    def all_ids(self) -> list[int]:
        """Return the ids of all of this rank's samples."""
        return [number for ids in self.ids for number in ids.tolist()]


class SkipWatch:
    """Follow the steps left out. `steps` are the numbers (from 1) of those among the last WINDOW_STEPS."""

    def __init__(self, limit: int | None, *, rolls_back: bool) -> None:
        self.limit, self.rolls_back = limit, rolls_back
        self.steps: list[int] = []
        self._ranks: dict[int, list[int]] = {}  # step -> the ranks whose losses were not finite
        self._unread: deque[_Update] = deque(maxlen=WINDOW_STEPS)
        self._path_of: Callable[[int], str] = str
        self._path: Path | None = None
        self._file: AppendFile | None = None

    def open(self, folder: Path, path_of: Callable[[int], str], last_step: int) -> None:
        """Say where the rows go and how a sample's path is found; rows beyond `last_step` are dropped."""
        self.close()
        self._path_of = path_of
        if distributed.is_main():
            self._path, self._file = folder / "skipped_steps.jsonl", None
            keep_rows(self._path, last_step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def load(self, steps: list[int]) -> None:
        """Take over the steps that a checkpoint knows of."""
        self.steps = list(steps)
        self.forget(0)

    def add(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Take update number `step`, from 1."""
        ids, weights = ([batch[name] for batch in batches] for name in ("sample_id", "weight"))
        self._unread.append(_Update(step, result.applied, ids, weights, result.losses))

    def forget(self, step: int) -> None:
        """Let go of the steps since the last report, of which the meters know that none was left out."""
        self._unread.clear()
        self.steps = [number for number in self.steps if number > step - WINDOW_STEPS]

    def read(self, step: int) -> int:
        """Find out which steps since the last call were left out, report them, and return how many; all ranks together.

        A host synchronisation.
        """
        if not self._unread:
            return 0
        flags = torch.stack([update.applied for update in self._unread]).tolist()
        skipped = [update for update, applied in zip(self._unread, flags) if applied == 0]
        self.forget(step)
        self.steps += [update.step for update in skipped]
        if skipped:
            self._report(skipped[:_DETAILED])
        return len(skipped)

    def check(self, step: int) -> None:
        """Raise where more steps than the limit were left out: UserError, or TooManySkipped for a roll-back."""
        if self.limit is None or len(self.steps) <= self.limit:
            return
        named = sorted({rank for number in self.steps for rank in self._ranks.get(number, [])})
        where = f"losses on rank {', '.join(map(str, named))}" if named else "gradients, of finite losses, on all ranks"
        message = (
            f"loop.max_skipped_steps: {len(self.steps)} of the last {min(step, WINDOW_STEPS)} steps before step {step} "
            f"were not finite ({where}), first step {self.steps[0]}; {self.limit} are allowed. See skipped_steps.jsonl "
            "for their samples; "
        )
        if self.rolls_back:
            raise TooManySkipped(self.steps[0], message)
        raise UserError(
            message + "set a lower optim.lr, loop.clip_grad_norm, runtime.precision=fp32, a higher limit or null, or "
            "loop.on_too_many_skipped=rollback to go on past them"
        )

    def _report(self, skipped: list[_Update]) -> None:
        """Say on rank 0 which samples the steps were made of: those with a bad loss, all where every loss is finite."""
        own = [(update.not_finite(), update.all_ids()) for update in skipped]
        every = distributed.gather_objects(own)
        for index, update in enumerate(skipped):
            ranks = [rank for rank, found in enumerate(every) if found[index][0]]
            self._ranks[update.step] = ranks
            if not distributed.is_main():
                continue
            ids = [number for found in every for number in found[index][0 if ranks else 1]]
            paths = [self._path_of(number) for number in ids]
            what = "loss" if ranks else "gradient"
            log.warning(
                "step %d was left out: its %s was not finite%s; samples: %s%s",
                update.step, what, f" on rank {', '.join(map(str, ranks))}" if ranks else " (every loss was)",
                ", ".join(paths[:_SHOWN]), f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "",
            )  # fmt: skip
            if self._file is None and self._path is not None:
                self._file = AppendFile(self._path)
            row = {"step": update.step, "ranks": ranks, "what": what, "paths": paths}
            if self._file is not None:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Bring the rows to the disk."""
        if self._file is not None:
            self._file.sync()
