"""The schema of `loop`, `runtime` and the keys of every training script. Defaults are in conf/."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from optim.config import OptimConfig, ScheduleConfig
from utils.config.bounds import (
    BelowOne,
    Count,
    CountOrZero,
    Duration,
    Patience,
    Pixels,
    Positive,
    Seed,
    Share,
    SizeHW,
    Some,
    between,
)
from utils.config.messages import ConfigError, validate
from utils.config.schema import PathText, Strict, TermsText
from utils.config.sweep_config import SweepConfig
from utils.errors import UserError


def largest_divisor(count: int, most: int) -> int:
    """Return the largest divisor of `count` up to `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


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


class PhaseConfig(Strict):
    """A `fraction` of a run's updates at another size: of images, or of the areas of buckets."""

    fraction: Share
    image_size_hw: SizeHW | None = None
    areas_px: Some[Pixels] | None = None


class AutoLengthConfig(Strict):
    """The length of `total_epochs=auto`: `epochs`, or more epochs until `samples` are read, at most `most_epochs`."""

    epochs: Duration
    samples: Count
    most_epochs: Duration | None


class _LoopConfig(Strict):
    """Length, batch sizes, evaluations and checkpoints of a run. `total_steps` takes precedence over `total_epochs`."""

    total_epochs: Literal["auto"] | Duration
    auto: AutoLengthConfig
    total_steps: CountOrZero | None  # 0: evaluate `init_from` and save it as a run
    minutes: Positive | None  # in place of both (engine/run/pace.py)
    best: str | None  # the figure of an evaluation that selects the best weights; None: the task chooses it
    early_stop_epochs: Duration | None  # end at an evaluation this many epochs after the last improvement
    early_stop_least: Annotated[float, Field(ge=0)]  # a smaller change is no improvement
    batch_size: Count
    micro_batch_size: Literal["auto"] | Count  # auto: all samples of a rank
    sampling: Literal["shuffled", "balanced"]
    find: TermsText | None  # training images, by the terms of data/collection/search.py
    per_class: Count | Share | None
    count: Count | None
    clip_grad_norm: Positive | None
    ema_decay: BelowOne | None
    ema_warmup: bool
    ema_start_steps: CountOrZero
    log_every_steps: Count
    evaluate_every_epochs: Literal["auto"] | Duration
    checkpoint_every_steps: Count
    checkpoint_every_minutes: Duration | None
    keep_weights_every: Count | None
    checkpoint_mirror: PathText | None
    phases: Some[PhaseConfig] | None

    @property
    def at_once(self) -> int:
        """The most samples that a device takes at once."""
        return self.batch_size if self.micro_batch_size == "auto" else self.micro_batch_size

    def micro_batches(self, world_size: int, chunk: int | None) -> tuple[int, int]:
        """Return (micro_batch_size, accum_steps): the largest divisor of a rank's share up to `at_once`.

        chunk: samples of one shape that follow each other; a micro-batch is within one chunk. Raises UserError.
        """
        share, rest = divmod(self.batch_size, world_size)
        if rest:
            allowed = ", ".join(str(size) for size in (share * world_size, (share + 1) * world_size) if size)
            raise UserError(
                f"loop.batch_size: {self.batch_size} does not divide by the {world_size} ranks; set it to {allowed}, "
                "or change the number of processes"
            )
        micro = largest_divisor(share if chunk is None else math.gcd(share, chunk), self.at_once)
        return micro, share // micro


class MachineConfig(Strict):
    """The machine. `auto` is decided at startup (engine/update/runtime.py)."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    workers: Literal["auto"] | CountOrZero
    threads: Count | None
    deterministic: bool
    hang_timeout_sec: Patience


MACHINE = MachineConfig(  # where no configuration states one
    device="auto", precision="fp32", channels_last="auto", workers="auto", threads=None,
    deterministic=False, hang_timeout_sec=1800.0,
)  # fmt: skip


class RuntimeConfig(MachineConfig):
    """The machine, with settings for training."""

    compile: Literal["auto"] | bool
    cuda_graphs: bool
    prefetch_batches: Count
    grad_checkpointing: bool
    offload: bool
    memory_gib: Positive | None


class _LRFinderConfig(Strict):
    """The range test before the first update, which finds the peak learning rate (engine/run/lr_finder.py).

    enabled: auto makes a test unless `optim.lr` is set or the run is short. only: make the test, and end.
    """

    enabled: Literal["auto"] | bool
    steps: between(int, 100, 10**6)
    only: bool


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

    def at_phases(self) -> list[Self]:
        """Return the run's configuration at the sizes of `loop.phases`. Raises ValueError."""
        return [self._at(phase, f"loop.phases.{number}") for number, phase in enumerate(self.loop.phases or ())]

    def _at(self, phase: PhaseConfig, key: str) -> Self:
        values = self.model_dump()
        values["loop"]["phases"] = None
        buckets = getattr(getattr(self, "task", None), "buckets", None)
        if phase.areas_px is None and phase.image_size_hw is not None and "augment" in values:
            values["augment"]["image_size_hw"] = phase.image_size_hw
        elif phase.image_size_hw is None and phase.areas_px is not None and buckets and not buckets.sizes_hw:
            values["task"]["buckets"] = buckets.of_areas(phase.areas_px).model_dump()
        else:
            areas = "areas_px with task.buckets.sizes_hw=null and fit=null"
            raise ValueError(f"{key}: set one size: image_size_hw, or for SDXL and its VAE {areas}")
        try:
            return validate(values, type(self))
        except ConfigError as error:
            raise ValueError(f"{key}: {'; '.join(error.args)}") from error

    def check_fused(self, precision: str, world_size: int) -> None:
        """Raise UserError if the run needs all gradients before an update, with `optim.fused_backward`."""
        micro, accum = self.loop.micro_batches(1, getattr(self.task, "chunk", None))
        wrong = {
            f"{world_size} ranks: run one process": world_size > 1,
            f"{accum} micro-batches of {micro} (loop.micro_batch_size; task.chunk of SDXL and its VAE)": accum > 1,
            "loop.clip_grad_norm: set null": self.loop.clip_grad_norm is not None,
            "runtime.precision=fp16: set bf16": precision == "fp16",
        }
        reason = next((reason for reason, is_wrong in wrong.items() if is_wrong), None)
        if reason and getattr(self.optim, "fused_backward", False):
            raise UserError(
                f"optim.fused_backward: true updates each parameter before there are all gradients, which excludes "
                f"{reason}; or set it to false"
            )

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        total = math.fsum(phase.fraction for phase in self.loop.phases or ())
        if total > 1 - 1e-6:
            raise ValueError(f"loop.phases: the fractions add up to {total:g}; set less than 1 in all")
        if total and self.loop.minutes is not None:
            raise ValueError(
                f"loop.phases: parts of a number of steps, but loop.minutes={self.loop.minutes:g} finds the number on "
                "the way; set loop.total_steps in its place, or phases=null"
            )
        self.at_phases()
        return self

    @model_validator(mode="after")
    def _every_key_is_read(self) -> Self:
        if self.init_weights == "ema" and self.init_from in (None, "timm"):
            raise ValueError(
                f"init_weights: ema, but init_from={self.init_from} has no averaged weights; set "
                "init_from=RUN_OR_FILE, or init_weights=model"
            )
        if self.loop.checkpoint_mirror is not None and self.run_dir is None:
            raise ValueError("loop.checkpoint_mirror: the copy is found by the name of the run folder; set run_dir=...")
        if self.lr_finder.enabled is True and self.optim.lr is not None:
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
