r"""Train a classifier from scratch: find the learning rate, then one cycle of it, with live plots.

    python train.py                                                       the embedded glyphs
    python train.py data=image_folder data.root=PATH                      class folders, with or without train/ and val/
    python train.py model.name=convnext_atto optim=adamw data=image_folder data.root=PATH
    torchrun --nproc_per_node=8 train.py data=image_folder data.root=PATH

The same command resumes. To begin with weights, use finetune.py.
"""

from typing import Self

from pydantic import model_validator

from engine.run import build_task, run_path, run_training, start_ranks
from engine.tasks.classification import ClassificationTaskConfig
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import find_kind, task_schema
from models.config import TimmConfig
from utils.config.entry_point import Job, entry_point


class TrainConfig(ImageTrainingConfig):
    """conf/train.yaml, checked."""

    task: task_schema("train")

    @model_validator(mode="after")
    def _begins_from_scratch(self) -> Self:
        if self.init_from is not None:
            raise ValueError(f"init_from: train.py begins from scratch; python finetune.py init_from={self.init_from}")
        if isinstance(self.model, TimmConfig) and self.model.pretrained:
            raise ValueError("model.pretrained: train.py begins from scratch; python finetune.py model.pretrained=true")
        if isinstance(self.task, ClassificationTaskConfig) and self.task.head in ("kept", "fitted"):
            raise ValueError(
                f"task.head: {self.task.head} needs weights to begin with, and train.py begins from scratch; set "
                "task.head=drawn or standardised"
            )
        return self


@entry_point("train", TrainConfig)
def main(config: ImageTrainingConfig, job: Job) -> str:
    """Train from scratch."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    kind = find_kind(config.task.name, "task.name")
    data = kind.open_training_data(config, runtime, run_path(config, job))
    setup = kind.set_up(config, data.collection)
    streams = kind.streams(data, setup, config)

    # --------------------------------------------------------------------------------------------------- 3. The task
    task = build_task(lambda: kind.build(setup), config)

    # ----------------------------------------------------------------------------------------------- 4. The training
    # lr_finder.enabled (conf/train.yaml) finds the rate before the first update.
    return run_training(
        task, streams, config, job, runtime, prepare=lambda: kind.prepare(task, data, setup, config, runtime)
    )


if __name__ == "__main__":
    main()
