"""The shape of `optim` and `schedule`. Values and defaults are in conf/optim/ and conf/schedule/."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from utils.config.bounds import (
    BelowOne,
    Count,
    CountOrZero,
    DurationOrZero,
    Factor,
    Positive,
    Rate,
    Share,
)
from utils.config.schema import Strict


class RuleConfig(Strict):
    """Settings of the parameters whose name matches the pattern `match`, such as `network.head.*`.

    lr_scale multiplies the scale of layer decay. weight_decay is fixed, not scheduled, and also applies to vectors.
    freeze_steps: updates at the start during which the parameters do not change.
    """

    match: Annotated[str, Field(min_length=1)]
    lr_scale: Factor | None = None
    weight_decay: Factor | None = None
    freeze_steps: Count | None = None

    @model_validator(mode="after")
    def _states_something(self) -> "RuleConfig":
        if self.lr_scale is None and self.weight_decay is None and self.freeze_steps is None:
            raise ValueError(f"{self.match!r} sets nothing; give lr_scale, weight_decay or freeze_steps")
        return self


class _Optim(Strict):
    """What every optimiser has: a learning rate, weight decay, layer decay, rules.

    `lr` takes precedence over `base_lr`; base_lr is stated for 256 samples per step.
    """

    lr: Rate | None
    base_lr: Rate
    weight_decay: Factor
    layer_decay: Share
    layer_decay_kind: Literal["single", "group", "timm"]
    rules: list[RuleConfig]


class _AdamW(_Optim):
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: Positive


class AdamWConfig(_AdamW):
    """torch's AdamW, fused; with bf16_weights our own on bfloat16 weights (optim/stochastic.py)."""

    name: Literal["adamw"]
    bf16_weights: bool


class AdamW8bitConfig(_AdamW):
    """bitsandbytes' AdamW, which keeps both averages in 8 bits each."""

    name: Literal["adamw8bit"]


class AdanConfig(_Optim):
    """Our Adan (optim/adan.py)."""

    name: Literal["adan"]
    betas: Annotated[list[BelowOne], Field(min_length=3, max_length=3)]
    eps: Positive


class SGDConfig(_Optim):
    """torch's SGD with momentum, fused."""

    name: Literal["sgd"]
    momentum: BelowOne
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov: true needs optim.momentum above 0; set optim.momentum=0.9")
        return self


class TimmOptimConfig(_Optim):
    """Any optimiser of timm by name; `extra` holds its own arguments, which `check_optimizer` tries."""

    name: Literal["timm"]
    opt: str
    extra: dict[str, JsonValue]


OptimConfig = Annotated[
    AdamWConfig | AdamW8bitConfig | AdanConfig | SGDConfig | TimmOptimConfig, Field(discriminator="name")
]


class _Schedule(Strict):
    """What every schedule has. `warmup_steps` takes precedence over `warmup_epochs`."""

    warmup_epochs: DurationOrZero
    warmup_steps: CountOrZero | None


class CosineConfig(_Schedule):
    """Linear warm-up, then half a cosine from lr to min_lr; weight decay to weight_decay_end, if set.

    restarts: how often the rate goes back to lr and down again; all cycles are equally long.
    Source: Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5, with T_mult 1.
    """

    name: Literal["cosine"]
    min_lr: Rate
    restarts: CountOrZero
    weight_decay_end: Factor | None


class ConstantConfig(_Schedule):
    """Linear warm-up, then lr."""

    name: Literal["constant"]


class OneCycleConfig(Strict):
    """Smith's one-cycle policy: up from lr / div_factor, down to lr / div_factor / final_div_factor; momentum opposite.

    peak_fraction: of the run, to the peak. three_phase: down to lr / div_factor as fast as up, then on to the end.
    cycle_momentum: false leaves momentum and beta1 as the optimiser has them.
    Source: Smith, Topin, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """

    name: Literal["onecycle"]
    curve: Literal["cosine", "linear"]
    three_phase: bool
    peak_fraction: Annotated[float, Field(ge=1e-6, lt=1)]
    div_factor: Annotated[float, Field(ge=1, le=1e12)]
    final_div_factor: Annotated[float, Field(ge=1, le=1e12)]
    cycle_momentum: bool
    momentum_low: BelowOne
    momentum_high: BelowOne

    @model_validator(mode="after")
    def _three_phases_fit(self) -> "OneCycleConfig":
        if self.three_phase and self.peak_fraction > 0.5:
            raise ValueError(
                f"schedule.peak_fraction: {self.peak_fraction:g} leaves no time for the way down of "
                "schedule.three_phase=true, which is as long as the way up; set at most 0.5"
            )
        return self

    @model_validator(mode="after")
    def _the_momentum_falls_to_the_peak(self) -> "OneCycleConfig":
        if self.momentum_low > self.momentum_high:
            raise ValueError(
                f"schedule.momentum_low: {self.momentum_low:g} is above schedule.momentum_high={self.momentum_high:g}; "
                "the momentum is lowest where the rate is highest"
            )
        return self


ScheduleConfig = Annotated[CosineConfig | ConstantConfig | OneCycleConfig, Field(discriminator="name")]
