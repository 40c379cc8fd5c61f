"""The shape of `optim` and `schedule`. Values and defaults are in conf/optim/ and conf/schedule/."""

import inspect
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from utils.config.schema import Strict
from utils.errors import close_names

Beta = Annotated[float, Field(ge=0, lt=1)]


class RuleConfig(Strict):
    """Settings of the parameters whose name matches the pattern `match`, such as `network.head.*`.

    lr_scale multiplies the scale of layer decay. weight_decay is fixed, not scheduled, and also applies to vectors.
    freeze_steps: updates at the start during which the parameters do not change. A field that is absent changes
    nothing.
    """

    match: Annotated[str, Field(min_length=1)]
    lr_scale: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    freeze_steps: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _states_something(self) -> "RuleConfig":
        if self.lr_scale is None and self.weight_decay is None and self.freeze_steps is None:
            raise ValueError(f"{self.match!r} sets nothing; give lr_scale, weight_decay or freeze_steps")
        return self


class _Optim(Strict):
    """What every optimiser has: a learning rate, weight decay, layer decay, rules.

    `lr` takes precedence over `base_lr`; base_lr is stated for 256 samples per step.
    """

    lr: Annotated[float, Field(ge=0)] | None
    base_lr: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    layer_decay_kind: Literal["single", "group", "timm"]
    rules: list[RuleConfig]


class AdamWConfig(_Optim):
    """torch's AdamW, fused."""

    name: Literal["adamw"]
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)]
    eps: Annotated[float, Field(gt=0)]


class AdanConfig(_Optim):
    """Our Adan (optim/adan.py)."""

    name: Literal["adan"]
    betas: Annotated[list[Beta], Field(min_length=3, max_length=3)]
    eps: Annotated[float, Field(gt=0)]


class SGDConfig(_Optim):
    """torch's SGD with momentum, fused."""

    name: Literal["sgd"]
    momentum: Beta
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
    extra: dict[str, Any]

    def extra_arguments(self) -> list[str]:
        """Return the names of the optimiser's own arguments."""
        import timm.optim  # takes 0.8 s, so only where it is used

        try:
            made = timm.optim.get_optimizer_class(self.opt, bind_defaults=False)
        except AssertionError as error:  # apex and bitsandbytes without a GPU
            raise ValueError(f"optim.opt: {self.opt} cannot be used here ({error}); choose another") from error
        taken = {"params", "lr", "weight_decay"}
        return [name for name in inspect.signature(made).parameters if name not in taken]

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
        for name in self.extra:
            if name not in allowed:
                raise ValueError(f"optim.extra.{name}: {self.opt} takes no such argument; {close_names(name, allowed)}")
        return self


OptimConfig = Annotated[AdamWConfig | AdanConfig | SGDConfig | TimmOptimConfig, Field(discriminator="name")]


class PhaseConfig(Strict):
    """A phase of a knob: from its value so far to `to` by a curve, in `steps`, `epochs` or a `fraction` of the run.

    Without a duration the phase lasts to the end of the run.
    """

    to: float
    curve: Literal["cosine", "linear"]
    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None

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

    start: float
    phases: list[PhaseConfig]

    @model_validator(mode="after")
    def _only_the_last_phase_is_open(self) -> "KnobConfig":
        if any(not phase.has_duration for phase in self.phases[:-1]):
            raise ValueError("phases: only the last may have no duration; give the others steps, epochs or fraction")
        return self


class _Schedule(Strict):
    """What every schedule has. `warmup_steps` takes precedence over `warmup_epochs`."""

    warmup_epochs: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)] | None
    knobs: dict[str, KnobConfig]


class CosineConfig(_Schedule):
    """Linear warm-up, then half a cosine from lr to min_lr; weight decay to weight_decay_end, if set.

    restarts: how often the rate goes back to lr and down again; all cycles are equally long.
    Source: Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5, with T_mult 1.
    """

    name: Literal["cosine"]
    min_lr: Annotated[float, Field(ge=0)]
    restarts: Annotated[int, Field(ge=0)]
    weight_decay_end: Annotated[float, Field(ge=0)] | None


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
    peak_fraction: Annotated[float, Field(gt=0, lt=1)]
    div_factor: Annotated[float, Field(ge=1)]
    final_div_factor: Annotated[float, Field(ge=1)]
    cycle_momentum: bool
    momentum_low: Beta
    momentum_high: Beta
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
