"""The schema of `optim` and `schedule`. Defaults are in conf/optim/ and conf/schedule/."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from utils.config.bounds import BelowOne, Count, CountOrZero, DurationOrZero, Factor, Name, Share, Two
from utils.config.schema import Strict

_JOINT = ("lamb", "adan", "bnb", "fused")  # parts of timm's names: all gradients or steps together, or not tried


class RuleConfig(Strict):
    """Settings of the parameters whose names match the pattern `match`, such as `network.head.*`."""

    match: Name
    lr_scale: Factor | None = None  # multiplies the scale of layer decay
    weight_decay: Factor | None = None  # fixed, not scheduled; also for vectors
    freeze_steps: Count | None = None  # the first updates, which leave the parameters unchanged


class _Optim(Strict):
    """The keys of every optimiser."""

    lr: Factor | None  # takes precedence over base_lr
    base_lr: Factor  # for 256 samples per step
    weight_decay: Factor
    layer_decay: Share
    layer_decay_kind: Literal["single", "group", "timm"]
    rules: list[RuleConfig]

    @property
    def keeps_layout(self) -> bool:
        """Whether parameters keep their memory; bitsandbytes replaces that of parameters that are not contiguous."""
        return not getattr(self, "opt", "").startswith("bnb")


class _AdamW(_Optim):
    betas: Two[BelowOne]


class AdamWConfig(_AdamW):
    """torch's fused AdamW. bf16_weights: its weights and averages are bfloat16 (optim/alone.py)."""

    name: Literal["adamw"]
    bf16_weights: bool
    fused_backward: bool


class ProdigyConfig(_AdamW):
    """Prodigy (arXiv 2306.06101), with one rate d for all parameters."""

    name: Literal["prodigy"]
    extra: dict[str, JsonValue]

    @model_validator(mode="after")
    def _treats_parameters_alike(self) -> Self:
        values = {f"rules.{number}.lr_scale": rule.lr_scale for number, rule in enumerate(self.rules)}
        for key, value in {**values, "layer_decay": self.layer_decay}.items():
            if value not in (None, 1.0):
                raise ValueError(f"optim.{key}: {value}, but optim=prodigy has one rate for all parameters; remove it")
        return self


class SGDConfig(_Optim):
    """torch's fused SGD with Nesterov momentum."""

    name: Literal["sgd"]
    momentum: BelowOne
    fused_backward: bool


class TimmOptimConfig(_Optim):
    """Any optimiser of timm. extra: its arguments, checked by `check_optimizer`.

    bf16_weights: for Adafactor, which computes in float32 and keeps its state so (optim/alone.py).
    """

    name: Literal["timm"]
    opt: str
    extra: dict[str, JsonValue]
    bf16_weights: bool
    fused_backward: bool

    @model_validator(mode="after")
    def _suits_the_optimiser(self) -> "TimmOptimConfig":
        usual = "set optim=adafactor or adamw, or false"
        if self.bf16_weights and not self.opt.endswith("adafactor"):
            raise ValueError(f"optim.bf16_weights: true, but {self.opt} would keep its state in bfloat16, too; {usual}")
        if self.fused_backward and any(name in self.opt for name in _JOINT):
            raise ValueError(f"optim.fused_backward: true, but {self.opt} updates no parameter alone; {usual}")
        return self


OptimConfig = Annotated[AdamWConfig | ProdigyConfig | SGDConfig | TimmOptimConfig, Field(discriminator="name")]


class _Schedule(Strict):
    """The keys of schedules with warm-up. `warmup_steps` takes precedence over `warmup_epochs`.

    warmup_most: a run of any length warms up for at most this share of its steps.
    """

    warmup_epochs: DurationOrZero
    warmup_steps: CountOrZero | None
    warmup_most: Share


class CosineConfig(_Schedule):
    """Linear warm-up, then half a cosine from lr to min_lr.

    restarts: the number of times the rate returns to lr; all cycles are equally long.
    Source: Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5, with T_mult 1.
    """

    name: Literal["cosine"]
    min_lr: Factor
    restarts: CountOrZero


class ConstantConfig(_Schedule):
    """Linear warm-up, then lr."""

    name: Literal["constant"]


class OneCycleConfig(Strict):
    """Smith's one-cycle policy with the numbers of torch's OneCycleLR (optim/schedules.py).

    cycle_momentum: momentum or beta1 moves opposite to the rate.
    Source: Smith, Topin, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """

    name: Literal["onecycle"]
    curve: Literal["cosine", "linear"]
    cycle_momentum: bool


ScheduleConfig = Annotated[CosineConfig | ConstantConfig | OneCycleConfig, Field(discriminator="name")]
