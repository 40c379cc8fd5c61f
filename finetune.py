r"""Fine-tuning of a classifier, from an FCMAE or another run, or from scratch where init_from is null.

    python finetune.py init_from=outputs/pretrain_fcmae/RUN                              the embedded glyphs
    torchrun --nproc_per_node=8 finetune.py model=convnextv2_base data=image_folder data.root=PATH augment=light \
        init_from=RUN

The same command resumes.
"""

from typing import Self

from pydantic import model_validator
from torch import nn

from data.build import build_loaders, load_collection, plain_loader, spread, training_rows
from data.collection import check_classes
from data.config import AugmentConfig, DataConfig
from engine.config import TrainingConfig
from engine.start import build_task, run_path, run_training, start_ranks
from engine.tasks.classification import ClassificationTask, LabelFields
from engine.tasks.config import ClassificationTaskConfig
from engine.tasks.head import prepare_head
from models.config import ModelConfig
from models.weights import initialise_from
from utils.config.entry_point import Job, entry_point

# A linear head is fitted well by so many images, in seconds.
HEAD_IMAGES = 16384


class FinetuneConfig(TrainingConfig):
    """conf/finetune.yaml, checked."""

    model: ModelConfig
    task: ClassificationTaskConfig
    data: DataConfig
    augment: AugmentConfig

    @model_validator(mode="after")
    def _a_kept_head_comes_from_somewhere(self) -> Self:
        if self.task.head == "kept" and self.init_from is None:
            raise ValueError(
                "task.head: kept keeps the head of init_from, and init_from is null; name a run or a weight file in "
                "init_from, or set task.head=drawn or standardised"
            )
        return self


@entry_point("finetune", FinetuneConfig)
def main(config: FinetuneConfig, job: Job) -> str:
    """Fine-tune."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    # Labelled images only; the training split's classes are the classes.
    collection = load_collection(config.data)
    class_names = check_classes(collection, config.task.allow_missing_classes)
    class_ids = collection.class_ids(class_names)
    train_rows, val_rows = training_rows(collection, config.loop.train_paths), collection.rows("val")
    train_rows, val_rows = (rows[class_ids[rows] >= 0] for rows in (train_rows, val_rows))
    loader, evaluation = build_loaders(
        collection,
        config.data,
        config.augment,
        LabelFields(class_ids),
        train_rows=train_rows,
        val_rows=val_rows,
        channels=config.model.in_channels,
        seed=config.seed,
        loop=config.loop,
        runtime=runtime,
        prefetch_batches=config.runtime.prefetch_batches,
        run_path=run_path(config, job),
    )

    # --------------------------------------------------------------------------------------------------- 3. The task
    task = build_task(
        lambda: ClassificationTask(
            config.model,
            config.task,
            class_names=class_names,
            preprocessing=config.augment.preprocessing(config.model.in_channels),
        ),
        config,
    )

    # ----------------------------------------------------------------------------------------------- 4. The training
    def initialise(network: nn.Module) -> None:
        initialise_from(network, config.init_from, keep_head=config.task.head == "kept", class_names=class_names)
        if config.task.head in ("standardised", "fitted"):
            images = plain_loader(
                collection,
                config.data,
                config.augment,
                LabelFields(class_ids),
                spread(train_rows, HEAD_IMAGES),
                channels=config.model.in_channels,
                seed=config.seed,
                batch_size=config.loop.batch_size,
                runtime=runtime,
                unreadable=loader.unreadable,
                augmented=True,
            )
            prepare_head(task, images, runtime, fit=config.task.head == "fitted")

    return run_training(
        task,
        loader,
        evaluation,
        config,
        job,
        runtime,
        fingerprints={"data.root": collection.fingerprint},
        depths=getattr(config.model, "depths", None),
        initialise=initialise,
    )


if __name__ == "__main__":
    main()
