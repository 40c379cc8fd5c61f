"""The shape of `task`: what each kind of training is set by. Values stand in conf/task/."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.schema import Strict


class ProbeConfig(Strict):
    """How often frozen features are probed (null: never in training), on at most how many images, with k neighbours."""

    every_epochs: Annotated[float, Field(gt=0)] | None
    train_images: Annotated[int, Field(ge=1)]
    val_images: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]


class FCMAETaskConfig(Strict):
    """Pretraining by reconstruction of masked patches. `patch_px` null means the network's total stride."""

    name: Literal["fcmae"]
    mask_ratio: Annotated[float, Field(gt=0, lt=1)]
    patch_px: Annotated[int, Field(ge=1)] | None
    decoder_dim: Annotated[int, Field(ge=1)]
    decoder_depth: Annotated[int, Field(ge=1)]  # without a block, nothing of the image would reach a gap
    norm_pix_loss: bool
    execution: Literal["sparse", "dense"]
    grn_over: Literal["sample", "batch"]
    probe: ProbeConfig


class ClassificationTaskConfig(Strict):
    """One class per image. `mixup_alpha` and `cutmix_alpha` are those of the beta distribution, 0 for off."""

    name: Literal["classification"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    mixup_alpha: Annotated[float, Field(ge=0)]
    cutmix_alpha: Annotated[float, Field(ge=0)]
    allow_missing_classes: bool
    head: Literal["drawn", "standardised", "fitted", "kept"]
