"""The shape of `loop`, `runtime` and of the keys that every training script has. Values are in conf/."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from optim.config import OptimConfig, ScheduleConfig
from utils.config.bounds import (
    BatchSize,
    BelowOne,
    Count,
    CountOrZero,
    Duration,
    Patience,
    Positive,
    Processes,
    Seed,
    Share,
    Workers,
)
from utils.config.schema import PathText, Strict
from utils.config.sweep import SweepConfig
from utils.record.config import TrackingConfig


class LoopConfig(Strict):
    """How long, how large, how often. `total_steps` takes precedence over `total_epochs`.

    total_steps: 0 measures `init_from` and saves it as a run.
    total_epochs, evaluate_every_epochs: `auto` derives them from the collection's sizes (engine/plan.py).
    batch_size: `auto` begins with all samples of a rank. on_out_of_memory: `halve` makes an update that runs out of
        memory again from micro-batches half as large (engine/batch_size.py).
    early_stop_epochs: the run ends after an evaluation that comes this many epochs after the best one.
    checkpoint_every_minutes: beside the steps, by the clock of rank 0; checkpoints change no result.
    """

    total_epochs: Literal["auto"] | Duration
    total_steps: CountOrZero | None
    early_stop_epochs: Duration | None
    global_batch_size: BatchSize
    batch_size: Literal["auto"] | BatchSize
    on_out_of_memory: Literal["halve", "stop"]
    sampling: Literal["shuffled", "blocks", "balanced"]
    train_paths: Annotated[list[str], Field(min_length=1)] | None
    clip_grad_norm: Positive | None
    ema_decay: BelowOne | None
    ema_warmup: bool
    log_every_steps: Count
    evaluate_every_epochs: Literal["auto"] | Duration
    checkpoint_every_steps: Count
    checkpoint_every_minutes: Duration | None
    keep_checkpoints: Count
    max_skipped_steps: Annotated[int, Field(ge=0, lt=100)] | None


class MachineConfig(Strict):
    """The machine: `auto` probes it, and the start-up lines show the choices."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    workers: Literal["auto"] | Workers
    threads: Processes | None
    deterministic: bool
    hang_timeout_sec: Patience


class RuntimeConfig(MachineConfig):
    """The machine as training uses it."""

    parallel: Literal["ddp", "fsdp"]
    compile: Literal["auto"] | bool
    prefetch_batches: Processes
    sync_batchnorm: bool
    grad_checkpointing: bool
    explain: bool


class LRFinderConfig(Strict):
    """A range test before the first update, which finds the peak learning rate (engine/lr_finder.py).

    steps: its updates; a run of which they are more than `max_share` has no range test.
    """

    enabled: bool
    steps: Annotated[int, Field(ge=100, le=10**6)]
    max_share: Share


class TrainingConfig(Strict):
    """What every training script's schema begins with; the script adds model, task, data and augment."""

    seed: Seed
    run_dir: PathText | None
    init_from: PathText | None
    init_weights: Literal["model", "ema"]
    resume: PathText
    resume_allow: list[str]
    dry_run: bool
    loop: LoopConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    lr_finder: LRFinderConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    sweep: SweepConfig

    @model_validator(mode="after")
    def _every_key_is_read(self) -> Self:
        if self.init_weights == "ema" and self.init_from in (None, "timm"):
            raise ValueError(
                f"init_weights: ema, but init_from is {self.init_from}, which holds no average; set "
                "init_from=RUN_OR_FILE, or init_weights=model"
            )
        if self.lr_finder.enabled and self.optim.lr is not None:
            raise ValueError(
                f"optim.lr: {self.optim.lr:g} is not read, because the range test finds the rate; set "
                "lr_finder.enabled=false to train at this rate, or optim.base_lr for the rate where it has no answer"
            )
        if self.loop.ema_decay is not None and self.optim.name == "adamw" and self.optim.bf16_weights:
            raise ValueError(
                f"optim.bf16_weights: true, and loop.ema_decay={self.loop.ema_decay:g} averages weights in their own "
                "precision, where such small changes are lost; set optim.bf16_weights=false or loop.ema_decay=null"
            )
        return self
