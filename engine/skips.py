"""Steps that were left out, not finite or without weight: which, on whose samples, and how many are too many.

Nothing is asked of the device between two reports: the last steps' flags, sample ids and losses stay where they are,
as references.

    {"step": 12, "ranks": [1], "what": "loss", "paths": ["cats/a.png"]}     a row of skipped_steps.jsonl

`what` was not finite, `loss` or `gradient`; or `weight`: no image of the step could be read.
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
from utils.errors import UserError
from utils.io.files import AppendFile
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.metrics_log import keep_rows

log = get_logger(__name__)

WINDOW_STEPS = 100  # of which `loop.max_skipped_steps` may be left out
EMPTY_STEPS = 10  # in a row, of which no image could be read: the collection is gone, whatever the limit
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
    weight: Tensor
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
    """Follow the steps left out.

    `steps` are the numbers (from 1) of those among the last WINDOW_STEPS, `empty` those of them that weighed nothing.
    """

    def __init__(self, limit: int | None, *, rolls_back: bool) -> None:
        self.limit, self.rolls_back = limit, rolls_back
        self.steps: list[int] = []
        self.empty: list[int] = []
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

    def load(self, steps: list[int], empty: list[int]) -> None:
        """Take over the steps that a checkpoint knows of."""
        self.steps, self.empty = list(steps), list(empty)
        self.forget(0)

    def add(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Take update number `step`, from 1."""
        ids, weights = ([batch[name] for batch in batches] for name in ("sample_id", "weight"))
        self._unread.append(_Update(step, result.applied, result.weight, ids, weights, result.losses))

    def forget(self, step: int) -> None:
        """Let go of the steps since the last report, of which the meters know that none was left out."""
        self._unread.clear()
        self.steps, self.empty = (
            [number for number in numbers if number > step - WINDOW_STEPS] for numbers in (self.steps, self.empty)
        )

    def read(self, step: int) -> int:
        """Find out which steps since the last call were left out, report them, and return how many; all ranks together.

        A host synchronisation.
        """
        if not self._unread:
            return 0
        figures = torch.stack([torch.stack([update.applied, update.weight]) for update in self._unread]).tolist()
        skipped = [update for update, (applied, _) in zip(self._unread, figures) if applied == 0]
        empty = [update.step for update, (_, weight) in zip(self._unread, figures) if weight == 0]
        self.forget(step)
        self.steps += [update.step for update in skipped]
        self.empty += empty
        if skipped:
            self._report(skipped[:_DETAILED])
        return len(skipped)

    def check(self, step: int, *, last: bool) -> None:
        """Raise where too much was left out by step `step`, the run's last one or not.

        UserError where no image could be read for EMPTY_STEPS steps, or in the whole of a shorter run; where more steps
        than the limit were left out UserError too, or TooManySkipped for a roll-back.
        """
        newest = range(max(1, step - EMPTY_STEPS + 1), step + 1)
        if (last or len(newest) == EMPTY_STEPS) and set(newest) <= set(self.empty):
            raise UserError(
                f"data.root: no image of the steps {newest[0]} to {step} could be read, see the warnings above and "
                "unreadable.jsonl; the weights are those of before. Bring the images back and give the same command "
                "again; prepare.py job=manifest lists what is unreadable"
            )
        if self.limit is None or len(self.steps) <= self.limit:
            return
        named = sorted({rank for number in self.steps for rank in self._ranks.get(number, [])})
        where = f"losses on rank {', '.join(map(str, named))}" if named else "gradients, of finite losses, on all ranks"
        reasons = [f"not finite ({where})"] if len(self.steps) > len(self.empty) else []
        reasons += [f"without an image that could be read ({len(self.empty)} of them)"] if self.empty else []
        message = (
            f"loop.max_skipped_steps: {len(self.steps)} of the last {min(step, WINDOW_STEPS)} steps before step {step} "
            f"were {' or '.join(reasons)}, first step {self.steps[0]}; {self.limit} are allowed. See "
            "skipped_steps.jsonl for their samples; "
        )
        if self.rolls_back:
            raise TooManySkipped(self.steps[0], message)
        remedy = "set a lower optim.lr, loop.clip_grad_norm, runtime.precision=fp32,"
        if len(self.steps) == len(self.empty):
            remedy = "mend the images (prepare.py job=manifest lists what is unreadable); or set"
        raise UserError(
            f"{message}{remedy} a higher limit or null, or loop.on_too_many_skipped=rollback to go on past them"
        )

    def _report(self, skipped: list[_Update]) -> None:
        """Say on rank 0 which samples the steps were made of: those with a bad loss, all where every loss is finite."""
        empty = set(self.empty)
        own = [(update.not_finite(), update.all_ids()) for update in skipped]
        every = distributed.gather_objects(own)
        for index, update in enumerate(skipped):
            ranks = [rank for rank, found in enumerate(every) if found[index][0]]
            self._ranks[update.step] = ranks
            if not distributed.is_main():
                continue
            ids = [number for found in every for number in found[index][0 if ranks else 1]]
            paths = [self._path_of(number) for number in ids]
            if ranks:
                what, reason = "loss", f"its loss was not finite on rank {', '.join(map(str, ranks))}"
            elif update.step in empty:
                what, reason = "weight", "none of its images could be read, or all of them weigh 0"
            else:
                what, reason = "gradient", "its gradient was not finite (every loss was)"
            log.warning(
                "step %d was left out: %s; samples: %s%s",
                update.step, reason, ", ".join(paths[:_SHOWN]),
                f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "",
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
