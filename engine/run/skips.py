"""Report skipped steps and their samples, and end a run that skips too many.

Flags, sample ids and losses of the last steps stay on the device until the next report.

    {"step": 12, "ranks": [1], "what": "loss", "paths": ["cats/a.png"]}     a row of skipped_steps.jsonl

what: `loss` or `gradient` was not finite, or `weight` was 0 because no image of the step could be read.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from engine.update.step import StepResult
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.files import AppendFile, Json, ignore_write_errors
from utils.ranks import distributed
from utils.record.logging import log
from utils.record.metrics_log import keep_rows

WINDOW_STEPS = 100
MOST_SKIPPED = 50  # of the last WINDOW_STEPS; more end the run
EMPTY_STEPS = 10  # this many steps in a row without a readable image end the run
_MOST_LOGGED = 8  # steps and paths in the log; the file has all
_FIELDS = ("sample_id", "weight")  # of a batch
_REASONS = {
    "loss": "its loss was not finite on rank {}",
    "gradient": "its gradient was not finite (every loss was)",
    "weight": "none of its images could be read, or all have weight 0",
}


def _sample_ids(batches: Sequence[Batch], result: StepResult) -> tuple[list[int], list[int]]:
    """Return the ids of this rank's samples with a loss that is not finite, and the ids of all its samples."""
    ids, weight = (torch.cat([batch[name] for batch in batches]) for name in _FIELDS)
    is_bad = ~torch.isfinite(torch.cat(list(result.losses))) & (weight > 0)
    return ids[is_bad].tolist(), ids.tolist()


class SkipWatch:
    """Count skipped steps. steps: (number from 1, cause) of the skipped ones among the last WINDOW_STEPS."""

    def __init__(self) -> None:
        self.steps = []
        self._pending = deque(maxlen=WINDOW_STEPS)  # (number, copies of `_FIELDS`, result)
        self._path_of = str
        self._path = None

    def open(self, folder: Path, path_of: Callable[[int], str], last_step: int) -> None:
        """Drop the rows of the file beyond `last_step`; later rows are appended. path_of: returns a sample's path."""
        self._path_of = path_of
        if distributed.is_main():
            self._path = folder / "skipped_steps.jsonl"
            keep_rows(self._path, last_step)

    def add(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Add update number `step`, from 1."""
        # Copies: a view of a packed batch would keep all of the batch's images.
        copies = [{name: batch[name].clone() for name in _FIELDS} for batch in batches]
        self._pending.append((step, copies, result))

    def read(self, step: int) -> None:
        """Report the skipped steps since the last call, on all ranks. A host synchronisation."""
        if not self._pending:
            return
        applied = torch.stack([result.applied for _, _, result in self._pending]).tolist()
        skipped = [update for update, is_applied in zip(self._pending, applied) if not is_applied]
        self._pending.clear()
        self.steps = [(number, what) for number, what in self.steps if number > step - WINDOW_STEPS]
        if not skipped:
            return
        ranks = distributed.gather_objects([_sample_ids(batches, result) for _, batches, result in skipped])
        rows = [self._describe(number, result, ids) for (number, _, result), *ids in zip(skipped, *ranks)]
        self.steps += [(row["step"], row["what"]) for row in rows]
        if self._path is None:
            return
        for row in rows[:_MOST_LOGGED]:
            reason = _REASONS[row["what"]].format(", ".join(map(str, row["ranks"])))
            log.warning(
                "step %d was skipped: %s; samples: %s", row["step"], reason, ", ".join(row["paths"][:_MOST_LOGGED])
            )
        with ignore_write_errors(self._path), closing(AppendFile(self._path)) as file:
            file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
            file.sync()

    def _describe(self, number: int, result: StepResult, ids: Sequence[tuple[list[int], list[int]]]) -> Json:
        """Return the row of a skipped step. ids: from `_sample_ids`, one pair a rank."""
        ranks = [rank for rank, (bad, _) in enumerate(ids) if bad]
        what = "gradient"
        if ranks:
            what = "loss"
        elif result.weight == 0:
            what = "weight"
        paths = [self._path_of(sample) for bad, samples in ids for sample in (bad if ranks else samples)]
        return {"step": number, "ranks": ranks, "what": what, "paths": paths}

    def check(self, step: int, *, last: bool) -> None:
        """Raise UserError after EMPTY_STEPS steps in a row without a readable image, or too many skipped steps.

        last: whether this is the run's last step; a run shorter than EMPTY_STEPS is checked there.
        """
        empty = [number for number, what in self.steps if what == "weight" and number > step - EMPTY_STEPS]
        if len(empty) == (min(step, EMPTY_STEPS) if last else EMPTY_STEPS):
            raise UserError(
                f"data.root: no image of steps {empty[0]} to {step} could be read; see the warnings above and "
                "unreadable.jsonl. These steps changed no weight. Restore the images and run the same command again; "
                "prepare.py job=manifest lists unreadable images"
            )
        if len(self.steps) > MOST_SKIPPED:
            raise UserError(
                f"optim.lr: {len(self.steps)} of the last {WINDOW_STEPS} steps before step {step} were skipped, first "
                f"step {self.steps[0][0]}; skipped_steps.jsonl has the causes and samples. Start another run with a "
                "lower learning rate (optim.lr, lr_finder.enabled=false) or loop.clip_grad_norm"
            )
