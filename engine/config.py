"""The shape of `loop`, `runtime`, `tracking` and of what every training script has. Values stand in conf/."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optim.config import OptimConfig, ScheduleConfig
from utils.schema import Strict

Positive = Annotated[int, Field(ge=1)]


class LoopConfig(Strict):
    """How long, how large, how often. `total_steps` wins over `total_epochs` when set."""

    total_epochs: Annotated[float, Field(gt=0)]
    total_steps: Positive | None
    global_batch_size: Positive
    batch_size: Positive
    sampling: Literal["shuffled", "balanced"]
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None
    log_every_steps: Positive
    evaluate_every_epochs: Annotated[float, Field(gt=0)]
    checkpoint_every_steps: Positive
    keep_checkpoints: Positive


class MachineConfig(Strict):
    """The machine: `auto` probes it, and the start-up lines say what was chosen."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    threads: Positive | None
    deterministic: bool
    hang_timeout_sec: Annotated[float, Field(gt=0)]


class RuntimeConfig(MachineConfig):
    """The machine as training uses it."""

    compile: Literal["auto"] | bool
    prefetch_batches: Positive
    sync_batchnorm: bool


class TrackingConfig(Strict):
    """Where figures go; `samples` also records which samples each step took, for audits and for loss spikes."""

    name: Literal["jsonl"]
    samples: bool


class SweepConfig(Strict):
    """The name of a multirun: its jobs' run folders lie in outputs/sweeps/<name>/."""

    name: str


class TrainingConfig(Strict):
    """What every training script's schema begins with; the script adds model, task, data and augment."""

    seed: Annotated[int, Field(ge=0)]
    run_dir: str | None
    init_from: str | None
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
