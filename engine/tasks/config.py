"""The schemas of `task` for kinds on images, and of the runs that train them. Values are in conf/task/."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.augment.config import AugmentConfig
from data.config import WholeData
from data.tags.rules import TagRulesConfig
from engine.config import TrainingConfig
from models.config import ModelConfig
from utils.config.bounds import BelowOne, Count, Duration, Factor, Fraction, Side, Width, between
from utils.config.schema import PathText, Strict
from utils.errors import UserError


class TaskConfig(Strict):
    """The base of all `task` groups; `name` is the kind's name in the table."""

    name: str

    def check_run(self, config: "ImageTrainingConfig") -> None:
        """Raise ValueError if other keys of the run do not suit the task. The message begins with the key."""


class TaskTrainingConfig(TrainingConfig):
    """The base of all schemas of kinds. The `task` of a script is the union of its kinds' (`training_schema`)."""

    task: TaskConfig

    @model_validator(mode="after")
    def _suits_the_task(self) -> Self:
        self.task.check_run(self)
        return self


class ImageTrainingConfig(TaskTrainingConfig):
    """The schema of kinds on images."""

    model: ModelConfig
    data: WholeData
    augment: AugmentConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if any((each.augment.shortest_px() or 0) > (self.augment.shortest_px() or 0) for each in self.at_phases()):
            raise ValueError("augment.shrink: true keeps too few pixels for a phase of loop.phases; set it to false")
        return self


class MixingConfig(Strict):
    """The keys of a task that mixes its batches. An alpha is the parameter of lambda's beta distribution; 0: off."""

    mixup_alpha: Factor
    cutmix_alpha: Factor
    mix_probability: Fraction  # of mixing a batch


class ClassificationTaskConfig(MixingConfig, TaskConfig):
    """Settings of a classifier's training."""

    name: Literal["classification"]
    label_smoothing: BelowOne
    head: Literal["random", "fitted", "refitted", "kept"]

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise ValueError for a head that the run cannot have."""
        if self.head == "kept" and config.init_from is None:
            raise ValueError(
                "task.head: kept needs the head of init_from, but init_from is null; set init_from to a run or a "
                "weight file, or set task.head=random"
            )


class RegressionTaskConfig(TaskConfig):
    """Settings of the training of a number."""

    name: Literal["regression"]


class TagLossConfig(Strict):
    """The loss. gamma_neg, clip: of the asymmetric loss; gamma, alpha: of the focal loss."""

    name: Literal["bce", "asl", "focal"]  # binary cross-entropy, asymmetric or focal loss
    gamma_neg: between(float, 0, 100)
    clip: BelowOne
    gamma: between(float, 1, 100)
    alpha: BelowOne


class LossWeightsConfig(Strict):
    """Weights of tags by their loss in about `window_steps` updates (`TaggingTask.tag_weights`)."""

    power: between(float, 0, 4)
    window_steps: Count


class TaggingTaskConfig(MixingConfig, TagRulesConfig, TaskConfig):
    """Settings of a tagger's training.

    vocabulary: a selected_tags.csv; null: the general and character tags with at least `min_count` training images.
    append_to: a tagger that gets the missing tags; the run has its network, preprocessing and weights, and no
    steps. known: tags that no image has, and that are absent, not unknown. keep_old: the weight of the targets of
    unknown tags, which are probabilities of the tagger in `init_from`. orientation: how mirroring an image changes its
    tags: booru, glyphs, or the path of a map; null: no mirroring.
    """

    name: Literal["tagging"]
    vocabulary: PathText | None
    append_to: PathText | None
    known: list[str]
    keep_old: Annotated[float, Field(ge=0)]
    min_count: Count
    orientation: PathText | None
    loss: TagLossConfig
    tag_weights: LossWeightsConfig | None  # null: all tags count alike

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise UserError for a mirror that would ignore the tags."""
        if config.augment.horizontal_flip > 0:
            raise UserError(
                f"augment.horizontal_flip: {config.augment.horizontal_flip:g} would mirror images without their tags; "
                "set augment.horizontal_flip=0, and task.orientation=booru to mirror both (or augment=tagger)"
            )


class ProbeConfig(Strict):
    """The probe of frozen features."""

    every_epochs: Duration | None  # null: not in training
    images: Count  # that the probe is fitted to
    k: Count  # neighbours


class FCMAETaskConfig(TaskConfig):
    """Pretraining by reconstructing masked patches. `patch_px` null means the network's total stride."""

    name: Literal["fcmae"]
    mask_ratio: Annotated[float, Field(ge=1e-6, lt=1)]
    patch_px: Side | None
    decoder_dim: Width
    decoder_depth: Count  # at least one block, or nothing of the image would reach a masked site
    probe: ProbeConfig
