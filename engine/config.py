"""The shape of `loop`, `runtime` and of the keys that every training script has. Values are in conf/."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optim.config import OptimConfig, ScheduleConfig
from utils.config.schema import Strict
from utils.record.config import TrackingConfig

Positive = Annotated[int, Field(ge=1)]


class LoopConfig(Strict):
    """How long, how large, how often. `total_steps` takes precedence over `total_epochs`."""

    total_epochs: Annotated[float, Field(gt=0)]
    total_steps: Positive | None
    global_batch_size: Positive
    batch_size: Positive
    sampling: Literal["shuffled", "balanced"]
    train_paths: Annotated[list[str], Field(min_length=1)] | None
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None
    ema_warmup: bool
    log_every_steps: Positive
    evaluate_every_epochs: Annotated[float, Field(gt=0)]
    plot_every_steps: Positive | None
    checkpoint_every_steps: Positive
    keep_checkpoints: Positive
    save_in_background: bool
    on_failed_save: Literal["stop", "retry"]
    max_skipped_steps: Annotated[int, Field(ge=0, lt=100)] | None
    on_too_many_skipped: Literal["stop", "rollback"]


class MachineConfig(Strict):
    """The machine: `auto` probes it, and the start-up lines show the choices."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    threads: Positive | None
    deterministic: bool
    hang_timeout_sec: Annotated[float, Field(gt=0)]


class RuntimeConfig(MachineConfig):
    """The machine as training uses it."""

    parallel: Literal["ddp", "fsdp"]
    compile: Literal["auto"] | bool
    prefetch_batches: Positive
    sync_batchnorm: bool
    grad_checkpointing: bool


class SweepConfig(Strict):
    """The name of a multirun: its jobs' run folders are in outputs/sweeps/<name>/."""

    name: str


class TrainingConfig(Strict):
    """What every training script's schema begins with; the script adds model, task, data and augment."""

    seed: Annotated[int, Field(ge=0)]
    run_dir: str | None
    init_from: str | None
    init_weights: Literal["model", "ema"]
    resume: str
    resume_allow: list[str]
    dry_run: bool
    loop: LoopConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    sweep: SweepConfig

    @model_validator(mode="after")
    def _momentum_is_scheduled_where_it_exists(self) -> "TrainingConfig":
        if self.schedule.name == "onecycle" and self.optim.name == "timm":
            raise ValueError(
                "schedule.name: onecycle moves the momentum, which timm's optimisers do not all have; "
                "set optim=adamw, optim=adan or optim=sgd, or schedule=cosine"
            )
        return self
