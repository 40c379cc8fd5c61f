r"""Fine-tune a network for classification, from an FCMAE or another run, or from scratch where init_from is null.

    python finetune.py init_from=outputs/pretrain_fcmae/RUN                              the embedded glyphs
    python finetune.py model=timm model.name=convnextv2_tiny.fcmae_ft_in22k_in1k model.pretrained=true \
        data=image_folder data.root=PATH augment=light
    torchrun --nproc_per_node=8 finetune.py model=convnextv2_base data=image_folder data.root=PATH augment=light \
        init_from=RUN

The same command resumes.
"""

from typing import Self

from pydantic import model_validator

from engine.run import build_task, run_path, run_training, start_ranks
from engine.tasks.classification import ClassificationTaskConfig
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import find_kind, task_schema
from engine.tasks.pretrained import use_pretrained
from models.config import TimmConfig
from utils.config.entry_point import Job, entry_point


class FinetuneConfig(ImageTrainingConfig):
    """conf/finetune.yaml, checked."""

    task: task_schema("finetune")

    @model_validator(mode="after")
    def _a_kept_head_needs_weights(self) -> Self:
        starts = self.init_from is not None or (isinstance(self.model, TimmConfig) and self.model.pretrained)
        if isinstance(self.task, ClassificationTaskConfig) and self.task.head == "kept" and not starts:
            raise ValueError(
                "task.head: kept keeps the head of init_from, and init_from is null; name a run or a weight file in "
                "init_from, or set task.head=drawn or standardised"
            )
        return self


@entry_point("finetune", FinetuneConfig)
def main(config: ImageTrainingConfig, job: Job) -> str:
    """Fine-tune."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)
    config = use_pretrained(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    kind = find_kind(config.task.name, "task.name")
    data = kind.open_training_data(config, runtime, run_path(config, job))
    setup = kind.set_up(config, data.collection)
    streams = kind.streams(data, setup, config)

    # --------------------------------------------------------------------------------------------------- 3. The task
    task = build_task(lambda: kind.build(setup), config)

    # ----------------------------------------------------------------------------------------------- 4. The training
    # A new run loads init_from, then prepares what depends on the data, such as a fitted head.
    return run_training(
        task, streams, config, job, runtime, prepare=lambda: kind.prepare(task, data, setup, config, runtime)
    )


if __name__ == "__main__":
    main()
