r"""FCMAE pretraining of ConvNeXt V2, without labels.

    python pretrain_fcmae.py                                                         the embedded glyphs
    torchrun --nproc_per_node=8 pretrain_fcmae.py model=convnextv2_base data=image_folder data.root=PATH \
        augment=pretrain

The same command resumes.
"""

from data.build import build_loaders, build_probe_loaders, load_collection, spread, training_rows
from data.config import AugmentConfig, DataConfig
from engine.config import TrainingConfig
from engine.start import build_task, run_path, run_training, start_ranks
from engine.tasks.classification import LabelFields
from engine.tasks.config import FCMAETaskConfig
from engine.tasks.fcmae import FCMAETask, MaskFields, patch_count
from models.config import ModelConfig
from models.weights import initialise_from
from utils.config.entry_point import Job, entry_point

# A loss is exact to a percent on so many images; all of a large split would take longer than an epoch of training.
VALIDATION_IMAGES = 4096


class PretrainConfig(TrainingConfig):
    """conf/pretrain_fcmae.yaml, checked."""

    model: ModelConfig
    task: FCMAETaskConfig
    data: DataConfig
    augment: AugmentConfig


@entry_point("pretrain_fcmae", PretrainConfig)
def main(config: PretrainConfig, job: Job) -> str:
    """Pretrain."""
    # ------------------------------------------------------------------------------------------ 1. Ranks and machine
    runtime = start_ranks(config)

    # --------------------------------------------------------------------------------------------------- 2. The data
    # All images of the training split serve, labelled or not. The loader's workers draw the masks.
    patches = patch_count(config.model, config.task, config.augment.image_size_hw)
    collection = load_collection(config.data)
    loader, evaluation = build_loaders(
        collection,
        config.data,
        config.augment,
        MaskFields(patches, config.task.mask_ratio),
        train_rows=training_rows(collection, config.loop.train_paths),
        val_rows=spread(collection.rows("val"), VALIDATION_IMAGES),
        channels=config.model.in_channels,
        seed=config.seed,
        loop=config.loop,
        runtime=runtime,
        prefetch_batches=config.runtime.prefetch_batches,
        run_path=run_path(config, job),
    )
    # Labels, where there are some, serve to probe the encoder now and then; it is never trained on them.
    probe, probe_loaders = config.task.probe, {}
    if probe.every_epochs is not None:
        probe_loaders = build_probe_loaders(
            collection,
            config.data,
            config.augment,
            LabelFields,
            probe,
            channels=config.model.in_channels,
            seed=config.seed,
            batch_size=config.loop.batch_size,
            runtime=runtime,
            unreadable=loader.unreadable,
        )

    # --------------------------------------------------------------------------------------------------- 3. The task
    augment = config.augment
    task = build_task(
        lambda: FCMAETask(
            config.model, config.task, image_size_hw=augment.image_size_hw, mean=augment.mean, std=augment.std
        ),
        config,
    )

    # ----------------------------------------------------------------------------------------------- 4. The training
    return run_training(
        task,
        loader,
        evaluation | probe_loaders,
        config,
        job,
        runtime,
        fingerprints={"data.root": collection.fingerprint},
        depths=getattr(config.model, "depths", None),
        initialise=lambda network: initialise_from(network, config.init_from, keep_head=True),
        rare_loaders=dict.fromkeys(probe_loaders, probe.every_epochs),
    )


if __name__ == "__main__":
    main()
