"""The shape of `tracking`. Values and defaults are in conf/tracking/."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.schema import Strict


class _Tracking(Strict):
    """metrics.jsonl is always written; `samples` also records the samples of each step, for audits.

    live_plots: another process draws plots/*_live.png while the run trains (utils/record/live_plot.py).
    """

    samples: bool
    live_plots: bool


class JsonlTrackingConfig(_Tracking):
    """metrics.jsonl alone."""

    name: Literal["jsonl"]


class WandbTrackingConfig(_Tracking):
    """Weights & Biases; `entity` null is the account's default. Bounds are W&B's own."""

    name: Literal["wandb"]
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    entity: str | None
    mode: Literal["online", "offline"]
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]


class TensorboardTrackingConfig(_Tracking):
    """TensorBoard event files in the run folder."""

    name: Literal["tensorboard"]


TrackingConfig = Annotated[
    JsonlTrackingConfig | WandbTrackingConfig | TensorboardTrackingConfig, Field(discriminator="name")
]
