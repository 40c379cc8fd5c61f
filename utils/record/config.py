"""The shape of `tracking`. Values and defaults are in conf/tracking/."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.bounds import Patience
from utils.config.schema import Strict


class FileTrackingConfig(Strict):
    """metrics.jsonl, which is always written, alone or also TensorBoard event files in the run folder."""

    name: Literal["jsonl", "tensorboard"]
    samples: bool  # also record the samples of each step
    single_plots: bool  # also draw each figure in a picture of its own


class WandbTrackingConfig(Strict):
    """Weights & Biases. The limits of texts are W&B's."""

    name: Literal["wandb"]
    samples: bool
    single_plots: bool
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    entity: str | None  # null: the account's default
    mode: Literal["auto", "online", "offline", "disabled"]  # auto: WANDB_MODE, else online if there is an API key
    group: Annotated[str, Field(min_length=1, max_length=128)] | None  # null: WANDB_RUN_GROUP, which sweeps set
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    notes: str | None
    model_artifact: bool  # log the weights of a complete run
    finish_timeout_sec: Patience  # the longest wait for the upload at the end of a run; a stopped run waits 5 s


TrackingConfig = Annotated[FileTrackingConfig | WandbTrackingConfig, Field(discriminator="name")]
