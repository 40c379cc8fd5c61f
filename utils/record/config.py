"""The shape of `tracking`. Values and defaults are in conf/tracking/."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.bounds import Patience
from utils.config.schema import Strict


class _Tracking(Strict):
    """metrics.jsonl is always written; `samples` also records the samples of each step, for audits."""

    samples: bool


class JsonlTrackingConfig(_Tracking):
    """metrics.jsonl alone."""

    name: Literal["jsonl"]


class WandbTrackingConfig(_Tracking):
    """Weights & Biases. Bounds are W&B's own.

    entity null: the account's default. mode auto: WANDB_MODE if it is set, else online where an API key is found, else
    offline. group null: WANDB_RUN_GROUP, which a multirun sets to the sweep's name. model_artifact: log the weights of
    a complete run. finish_timeout_sec: how long the end of a run waits for its upload.
    """

    name: Literal["wandb"]
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    entity: str | None
    mode: Literal["auto", "online", "offline", "disabled"]
    group: Annotated[str, Field(min_length=1, max_length=128)] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    notes: str | None
    model_artifact: bool
    finish_timeout_sec: Patience


class TensorboardTrackingConfig(_Tracking):
    """TensorBoard event files in the run folder."""

    name: Literal["tensorboard"]


TrackingConfig = Annotated[
    JsonlTrackingConfig | WandbTrackingConfig | TensorboardTrackingConfig, Field(discriminator="name")
]
