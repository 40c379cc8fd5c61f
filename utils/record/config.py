"""The shape of `tracking`. Values and defaults are in conf/tracking/."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.schema import Strict


class FileTrackingConfig(Strict):
    """metrics.jsonl, which is always written, alone or also TensorBoard event files in the run folder."""

    name: Literal["jsonl", "tensorboard"]
    samples: bool  # also record the samples of each step


class WandbTrackingConfig(Strict):
    """Weights & Biases. The limits of texts are W&B's."""

    name: Literal["wandb"]
    samples: bool
    weights: bool  # upload the best and the last weights of a complete run
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]


TrackingConfig = Annotated[FileTrackingConfig | WandbTrackingConfig, Field(discriminator="name")]
