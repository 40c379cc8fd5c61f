"""The schema of `loop`, `runtime` and the keys of every training script. Defaults are in conf/."""

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


class _LoopConfig(Strict):
    """Length, batch sizes, evaluations and checkpoints of a run. `total_steps` takes precedence over `total_epochs`."""

    total_epochs: Literal["auto"] | Duration  # auto: derived from the collection's size (engine/plan.py)
    total_steps: CountOrZero | None  # 0: evaluate `init_from` and save it as a run
    early_stop_epochs: Duration | None  # end at an evaluation this many epochs after the best one
    global_batch_size: BatchSize
    batch_size: Literal["auto"] | BatchSize  # auto: all samples of a rank
    on_out_of_memory: Literal["halve", "stop"]  # halve: repeat the update with smaller micro-batches
    sampling: Literal["shuffled", "blocks", "balanced"]
    train_paths: Annotated[list[str], Field(min_length=1)] | None
    train_per_class: Count | None
    train_count: Count | None
    clip_grad_norm: Positive | None
    ema_decay: BelowOne | None
    ema_warmup: bool
    ema_start_step: CountOrZero
    log_every_steps: Count
    evaluate_every_epochs: Literal["auto"] | Duration
    checkpoint_every_steps: Count
    checkpoint_every_minutes: Duration | None
    keep_checkpoints: Count
    max_skipped_steps: Annotated[int, Field(ge=0, lt=100)] | None


class MachineConfig(Strict):
    """The machine. `auto` is decided at startup (engine/runtime.py)."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    workers: Literal["auto"] | Workers
    threads: Processes | None
    deterministic: bool
    hang_timeout_sec: Patience


class RuntimeConfig(MachineConfig):
    """The machine, with settings for training."""

    parallel: Literal["ddp", "fsdp"]
    compile: Literal["auto"] | bool
    prefetch_batches: Processes
    sync_batchnorm: bool
    grad_checkpointing: bool
    explain: bool


class _LRFinderConfig(Strict):
    """A range test before the first update finds the peak learning rate (engine/lr_finder.py)."""

    enabled: bool
    steps: Annotated[int, Field(ge=100, le=10**6)]
    max_share: Share  # the test is skipped if its steps are a larger share of the run's
    only: bool  # end after the test


class TrainingConfig(Strict):
    """The keys of every training script; each script adds model, task, data and augment."""

    seed: Seed
    run_dir: PathText | None
    init_from: PathText | None
    init_weights: Literal["model", "ema"]
    resume: PathText
    resume_allow: list[str]
    dry_run: bool
    loop: _LoopConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    lr_finder: _LRFinderConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig
    sweep: SweepConfig

    @model_validator(mode="after")
    def _every_key_is_read(self) -> Self:
        if self.init_weights == "ema" and self.init_from in (None, "timm"):
            raise ValueError(
                f"init_weights: ema, but init_from={self.init_from} has no averaged weights; set "
                "init_from=RUN_OR_FILE, or init_weights=model"
            )
        if self.lr_finder.only and not self.lr_finder.enabled:
            raise ValueError("lr_finder.only: true needs lr_finder.enabled=true; set it, or lr_finder.only=false")
        if self.lr_finder.enabled and self.optim.lr is not None:
            raise ValueError(
                f"optim.lr: {self.optim.lr:g} is not used, because the range test finds the learning rate; set "
                "lr_finder.enabled=false to train at this rate, or optim.base_lr as the fallback"
            )
        if self.loop.ema_decay is not None and getattr(self.optim, "bf16_weights", False):
            raise ValueError(
                f"optim.bf16_weights: true, and loop.ema_decay={self.loop.ema_decay:g} would average in bfloat16, "
                "which loses small changes; set optim.bf16_weights=false or loop.ema_decay=null"
            )
        return self
