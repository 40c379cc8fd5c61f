"""Skipped steps, not finite or without weight: which they are, on which samples, and how many are too many.

Nothing is read from the device between two reports: flags, sample ids and losses of the last steps are kept there by
reference.

    {"step": 12, "ranks": [1], "what": "loss", "paths": ["cats/a.png"]}     a row of skipped_steps.jsonl

`what` is `loss` or `gradient`, the one that was not finite, or `weight`: no image of the step could be read.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.step import StepResult
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.files import AppendFile, ignore_write_errors
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.metrics_log import keep_rows

log = get_logger(__name__)

WINDOW_STEPS = 100  # of which `loop.max_skipped_steps` may be skipped
EMPTY_STEPS = 10  # after this many steps in a row without a readable image the run ends, with any limit
_DETAILED = 10  # steps of a report whose samples are listed
_SHOWN = 8  # paths in a message; the file has all


@dataclass(frozen=True)
class _Update:
    """Device tensors of update number `step` (from 1): [B] ids, weights and losses of each micro-batch."""

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
    """Count skipped steps.

    `steps`: the numbers (from 1) of the skipped steps among the last WINDOW_STEPS; `empty`: those without weight.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.empty: list[int] = []
        self._ranks: dict[int, list[int]] = {}  # step -> the ranks whose losses were not finite
        self._unread: deque[_Update] = deque(maxlen=WINDOW_STEPS)
        self._path_of: Callable[[int], str] = str
        self._path: Path | None = None
        self._file: AppendFile | None = None

    def open(self, folder: Path, path_of: Callable[[int], str], last_step: int) -> None:
        """Open the file of rows, without rows beyond `last_step`. `path_of` returns the path of a sample."""
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
        """Restore the steps of a checkpoint."""
        self.steps, self.empty = list(steps), list(empty)
        self.forget(0)

    def add(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Take update number `step`, from 1."""
        ids, weights = ([batch[name] for batch in batches] for name in ("sample_id", "weight"))
        self._unread.append(_Update(step, result.applied, result.weight, ids, weights, result.losses))

    def forget(self, step: int) -> None:
        """Release the steps since the last report, when the meters know that none was skipped."""
        self._unread.clear()
        self.steps, self.empty = (
            [number for number in numbers if number > step - WINDOW_STEPS] for numbers in (self.steps, self.empty)
        )

    def read(self, step: int) -> int:
        """Report the skipped steps since the last call and return their number; called on all ranks.

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
        """Raise where too many steps were skipped up to `step`; `last` marks the run's last step.

        UserError where no image could be read for EMPTY_STEPS steps, or in all of a shorter run, and where more steps
        were skipped than the limit.
        """
        newest = range(max(1, step - EMPTY_STEPS + 1), step + 1)
        if (last or len(newest) == EMPTY_STEPS) and set(newest) <= set(self.empty):
            raise UserError(
                f"data.root: no image of steps {newest[0]} to {step} could be read, see the warnings above and "
                "unreadable.jsonl; these steps changed no weight. Restore the images and give the same command again; "
                "prepare.py job=manifest lists unreadable images"
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
        remedy = "start another run with a lower rate (optim.lr, lr_finder.enabled=false), loop.clip_grad_norm"
        if len(self.steps) == len(self.empty):
            remedy = "fix the images (prepare.py job=manifest lists unreadable ones)"
        raise UserError(f"{message}{remedy}, or a higher limit")

    def _report(self, skipped: list[_Update]) -> None:
        """Log on rank 0 the samples of skipped steps: those with a bad loss, or all where every loss is finite."""
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
                what, reason = "weight", "none of its images could be read, or all have weight 0"
            else:
                what, reason = "gradient", "its gradient was not finite (every loss was)"
            log.warning(
                "step %d was skipped: %s; samples: %s%s",
                update.step, reason, ", ".join(paths[:_SHOWN]),
                f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "",
            )  # fmt: skip
            if self._file is None and self._path is not None:
                with ignore_write_errors(self._path):
                    self._file = AppendFile(self._path)
            row = {"step": update.step, "ranks": ranks, "what": what, "paths": paths}
            if self._file is not None:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Flush the rows to the disk."""
        if self._file is not None:
            self._file.sync()
