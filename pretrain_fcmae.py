r"""Pretrain a ConvNeXt V2 by FCMAE, without labels.

    python pretrain_fcmae.py                                                         the embedded glyphs
    torchrun --nproc_per_node=8 pretrain_fcmae.py model=convnextv2_base data=image_folder data.root=PATH \
        augment=pretrain

The same command resumes.
"""

from engine.run import build_task, run_path, run_training, start_ranks
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import find_kind, task_schema
from utils.config.entry_point import Job, entry_point


class PretrainConfig(ImageTrainingConfig):
    """conf/pretrain_fcmae.yaml, checked."""

    task: task_schema("pretrain_fcmae")


@entry_point("pretrain_fcmae", PretrainConfig)
def main(config: PretrainConfig, job: Job) -> str:
    """Pretrain."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    # All images of the training split, labelled or not. The loader's workers draw the masks. Labels are only used to
    # probe the encoder.
    kind = find_kind(config.task.name, "task.name")
    data = kind.open_training_data(config, runtime, run_path(config, job))
    setup = kind.set_up(config, data.collection)
    streams = kind.streams(data, setup, config)

    # --------------------------------------------------------------------------------------------------- 3. The task
    task = build_task(lambda: kind.build(setup), config)

    # ----------------------------------------------------------------------------------------------- 4. The training
    return run_training(task, streams, config, job, runtime)


if __name__ == "__main__":
    main()
