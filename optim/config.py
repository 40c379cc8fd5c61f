"""The shape of `optim` and `schedule`. Values and defaults are in conf/optim/ and conf/schedule/."""

import inspect
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from utils.config.bounds import (
    BelowOne,
    Count,
    CountOrZero,
    Duration,
    DurationOrZero,
    Factor,
    KnobValue,
    Positive,
    Rate,
    Share,
)
from utils.config.schema import Strict
from utils.errors import close_names

_OTHERS = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)  # of timm's types


class RuleConfig(Strict):
    """Settings of the parameters whose name matches the pattern `match`, such as `network.head.*`.

    lr_scale multiplies the scale of layer decay. weight_decay is fixed, not scheduled, and also applies to vectors.
    freeze_steps: updates at the start during which the parameters do not change. A field that is absent changes
    nothing.
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
    """Any optimiser of timm by name; `extra` holds its own arguments."""

    name: Literal["timm"]
    opt: str
    extra: dict[str, JsonValue]

    def extra_arguments(self) -> dict[str, Any]:
        """Return the types of the optimiser's own arguments by name."""
        import timm.optim  # takes 0.8 s, so only where it is used

        try:
            made = timm.optim.get_optimizer_class(self.opt, bind_defaults=False)
        except (AssertionError, ImportError) as error:  # apex and bitsandbytes without a GPU, or not installed
            raise ValueError(f"optim.opt: {self.opt} cannot be used here ({error}); choose another") from error
        taken = {"params", "lr", "weight_decay", "capturable", "differentiable"}  # the last two: not in train_step
        return {name: _type_of(one) for name, one in inspect.signature(made).parameters.items() if name not in taken}

    @property
    def has_beta1(self) -> bool:
        """Return whether its groups hold `betas`, whose first a schedule may move."""
        return "betas" in self.extra_arguments() and "adafactor" not in self.opt  # which keeps another name

    @model_validator(mode="after")
    def _extra_fits(self) -> "TimmOptimConfig":
        import timm.optim

        known = timm.optim.list_optimizers()
        if self.opt not in known:
            raise ValueError(f"optim.opt: unknown timm optimiser {self.opt!r}; {close_names(self.opt, known)}")
        if timm.optim.get_optimizer_info(self.opt).second_order:
            raise ValueError(
                f"optim.opt: {self.opt} needs second derivatives, which train_step does not compute; take a "
                "first-order one, such as optim.opt=nadamw"
            )
        if self.opt.startswith("kron"):
            raise ValueError(
                f"optim.opt: {self.opt} keeps lists of tensors and draws random numbers of its own, so a run could not "
                "be resumed exactly; take another, such as optim.opt=nadamw"
            )
        allowed = self.extra_arguments()
        for name, value in self.extra.items():
            if name not in allowed:
                raise ValueError(f"optim.extra.{name}: {self.opt} takes no such argument; {close_names(name, allowed)}")
            if isinstance(value, int) and abs(value) > 10**6:  # such as iterations of muon
                raise ValueError(f"optim.extra.{name}: {value} is too large; set 1,000,000 at most")
            try:  # as JSON, where a list may be a tuple, and nothing else passes for another type
                TypeAdapter(allowed[name], config=_OTHERS).validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ValueError(f"optim.extra.{name}: {value!r} does not suit {self.opt}: {reason}") from None
        if not self.opt.startswith(("bnb", "fused")):  # kernels of a GPU alone
            self._try_steps()
        return self

    def _try_steps(self) -> None:
        """Raise ValueError where the optimiser cannot be built with `extra`, or cannot step."""
        import timm.optim
        import torch

        parameters = [torch.ones(shape, requires_grad=True) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        try:
            optimizer = timm.optim.get_optimizer_class(self.opt)(parameters, lr=0.1, **self.extra)
            optimizer.step()
            optimizer.step()
        except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"optim.extra: timm's {self.opt} cannot be built with {self.extra} ({error}); its other arguments are "
                f"{', '.join(self.extra_arguments())}"
            ) from error


def _type_of(argument: inspect.Parameter) -> Any:
    """Return the type of an argument, by its default where the function does not state it."""
    if argument.annotation is not argument.empty:
        return argument.annotation
    default = argument.default
    if isinstance(default, tuple):
        return tuple[tuple(map(type, default))]
    return float if type(default) is int else type(default)


OptimConfig = Annotated[
    AdamWConfig | AdamW8bitConfig | AdanConfig | SGDConfig | TimmOptimConfig, Field(discriminator="name")
]


class PhaseConfig(Strict):
    """A phase of a knob: from its value so far to `to` by a curve, in `steps`, `epochs` or a `fraction` of the run.

    Without a duration the phase lasts to the end of the run.
    """

    to: KnobValue
    curve: Literal["cosine", "linear"]
    steps: Count | None = None
    epochs: Duration | None = None
    fraction: Share | None = None

    @property
    def has_duration(self) -> bool:
        """Whether the phase states how long it lasts."""
        return any(value is not None for value in (self.steps, self.epochs, self.fraction))

    @model_validator(mode="after")
    def _one_duration(self) -> "PhaseConfig":
        if sum(value is not None for value in (self.steps, self.epochs, self.fraction)) > 1:
            raise ValueError("a phase has one duration; give steps, epochs or fraction")
        return self


class KnobConfig(Strict):
    """A scheduled value that a task reads by name: it starts at `start` and goes through `phases` in their order.

    After the last phase the value is held; a phase from a value to the same value holds it too.
    """

    start: KnobValue
    phases: list[PhaseConfig]

    @model_validator(mode="after")
    def _only_the_last_phase_is_open(self) -> "KnobConfig":
        if any(not phase.has_duration for phase in self.phases[:-1]):
            raise ValueError("phases: only the last may have no duration; give the others steps, epochs or fraction")
        return self


class _Schedule(Strict):
    """What every schedule has. `warmup_steps` takes precedence over `warmup_epochs`."""

    warmup_epochs: DurationOrZero
    warmup_steps: CountOrZero | None
    knobs: dict[str, KnobConfig]


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
    knobs: dict[str, KnobConfig]

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
