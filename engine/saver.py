"""The saver: checkpoints and weight files of a run.

The weights of a checkpoint are a weight file of their own, which weights/last_weights.safetensors and
weights/ema_weights.safetensors link to: no tensor is written twice.
"""

import time
from typing import Any

from engine.checkpoint import remove_old, save_checkpoint, write_errors
from engine.config import LoopConfig
from engine.learner import Learner, Tensors
from engine.parallel import is_sharded
from engine.recorder import Recorder
from engine.writer import CheckpointWriter, Groups
from utils.errors import UserError
from utils.io.files import link_or_copy
from utils.io.weights import weight_metadata, write_weights
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.run_folder import RunFolder

log = get_logger(__name__)

# Weight files that a checkpoint's groups of tensors are linked to.
_LINKS = {"weights": "last", "average_weights": "ema"}


class Saver:
    """Write checkpoints and weights into a run folder. frozen: fingerprints of the task's frozen networks."""

    def __init__(self, folder: RunFolder, loop: LoopConfig, frozen: dict[str, str]) -> None:
        self.folder, self._frozen = folder, frozen
        self.writer = CheckpointWriter(in_background=loop.save_in_background, retries=loop.on_failed_save == "retry")
        self._keep = loop.keep_checkpoints
        self._refused: list[str] = []
        self._every_minutes = loop.checkpoint_every_minutes
        self._started, self._has_asked = time.monotonic(), False

    def is_due(self) -> bool:
        """Return, once, whether `loop.checkpoint_every_minutes` have passed since the last checkpoint; on rank 0."""
        if self._every_minutes is None or self._has_asked or not distributed.is_main():
            return False
        self._has_asked = time.monotonic() - self._started >= 60.0 * self._every_minutes
        return self._has_asked

    def save(
        self, learner: Learner, recorder: Recorder, state: dict[str, Any], *, best_step: int | None, last: bool
    ) -> None:
        """Write a checkpoint of this step and link its weights.

        `last`: the run ends here, so wait until everything is on the disk; otherwise it is written in the background.
        Raises UserError where the disk refuses the last checkpoint, or an earlier one without which the run must stop.
        """
        step = learner.step
        recorder.phase(step, "saving")
        learner.sync_buffers()
        recorder.skips.read(step)
        groups, others = learner.state()
        state = {"config": self.folder.config, **state, **recorder.state(), "optimizer": others}
        if not self._sync_samples(recorder, last):
            return
        if distributed.is_main():
            linked = ["weights", "average_weights"] if learner.exports_average else ["weights"]
            metadata = {group: self._metadata(learner, averaged=group == "average_weights") for group in linked}
            self.writer.submit(
                groups,
                lambda groups: self._write(step, groups, state, metadata, recorder, best_step),
                f"saved {self.folder.checkpoints}/step_{step:08d}",
                copied=is_sharded(learner.model),
            )
        if last:
            distributed.rank_zero_call(self.writer.finish)
        self._started, self._has_asked = time.monotonic(), False

    def write_best(self, learner: Learner, name: str, *, averaged: bool) -> None:
        """Write the exported networks, as they are now, as the weights `name`, best or best_raw; on all ranks.

        They are copied at once and written like a checkpoint, before the next one. averaged: they hold the average now.
        """
        tensors, step = learner.exported_tensors(), learner.step
        metadata = self._metadata(learner, averaged=averaged)
        path = self.folder.weights / f"{name}_weights.safetensors"

        def write(groups: Groups) -> None:
            try:
                with write_errors(self.folder.weights, f"the best weights of step {step}", groups):
                    write_weights(path, groups[name], metadata)
            except UserError:
                self._refused.append(name)
                raise

        if distributed.is_main():
            self.writer.submit({name: tensors}, write, f"saved {path}", copied=is_sharded(learner.model))

    def take_refused(self) -> list[str]:
        """Wait until nothing is being written; return which best weights the disk has refused since; on all ranks."""

        def wait() -> list[str]:
            self.writer.wait()
            refused, self._refused = self._refused, []
            return refused

        return distributed.rank_zero_call(wait)

    def _metadata(self, learner: Learner, *, averaged: bool) -> dict[str, Any]:
        """Return the metadata of a weight file."""
        return {
            "format": 1,
            "script": self.folder.job.script,
            "task": self.folder.config["task"],
            "model": self.folder.config["model"],
            "step": learner.step,
            "average": averaged,
            "precision": learner.runtime.precision,
            **({"frozen": self._frozen} if self._frozen else {}),
            **({"origin": learner.task.origin} if learner.task.origin else {}),
            **learner.task.exported().metadata,
        }

    def _sync_samples(self, recorder: Recorder, last: bool) -> bool:
        """Flush every rank's record of samples before the checkpoint beyond it.

        Returns False where a disk refuses it and the run continues without this checkpoint.
        """
        problem = None
        try:
            with write_errors(self.folder.path / "samples", "the record of samples", {}):
                recorder.sync_samples()
        except UserError as error:
            problem = error
        problems = [found for found in distributed.gather_objects(problem) if found is not None]
        if problems and (last or not self.writer.retries):
            raise problems[0]
        if problems:
            log.error("%s\nThe run continues and tries again at its next save (loop.on_failed_save=retry)", problems[0])
        return not problems

    def _write(
        self,
        step: int,
        groups: Tensors,
        state: dict[str, Any],
        metadata: dict[str, dict[str, Any]],
        recorder: Recorder,
        best_step: int | None,
    ) -> None:
        """Write a state to the disk; on rank 0, in the writer's thread."""
        with write_errors(self.folder.checkpoints, f"the checkpoint of step {step}", groups):
            recorder.sync()
            texts = {group: weight_metadata(values, groups[group]) for group, values in metadata.items()}
            path = save_checkpoint(self.folder.checkpoints, step, groups, state, texts)
            for group in metadata:
                name = f"{_LINKS[group]}_weights.safetensors"
                link_or_copy(path / f"{group}.safetensors", self.folder.weights / name)
            remove_old(self.folder.checkpoints, self._keep, step, best_step)
