"""The shape of `optim` and `schedule`. Values and defaults stand in conf/optim/ and conf/schedule/."""

import inspect
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from utils.config.schema import Strict
from utils.errors import close_names

Beta = Annotated[float, Field(ge=0, lt=1)]


class _Optim(Strict):
    """What every optimiser has: a rate, decay, layer decay.

    `lr` wins over `base_lr` when set; base_lr is stated for 256 samples per step.
    """

    lr: Annotated[float, Field(ge=0)] | None
    base_lr: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    layer_decay_kind: Literal["single", "group", "timm"]
    no_decay: list[str]


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
        """Return the arguments of its own that the optimiser takes."""
        import timm.optim  # 0.8 s, for those who use it

        try:
            made = timm.optim.get_optimizer_class(self.opt, bind_defaults=False)
        except AssertionError as error:  # apex and bitsandbytes without a GPU
            raise ValueError(f"optim.opt: {self.opt} cannot be used here ({error}); choose another") from error
        taken = {"params", "lr", "weight_decay"}
        return [name for name in inspect.signature(made).parameters if name not in taken]

    @model_validator(mode="after")
    def _extra_fits(self) -> "TimmOptimConfig":
        import timm.optim

        known = timm.optim.list_optimizers()
        if self.opt not in known:
            raise ValueError(f"optim.opt: unknown timm optimiser {self.opt!r}; {close_names(self.opt, known)}")
        if timm.optim.get_optimizer_info(self.opt).second_order:
            raise ValueError(
                f"optim.opt: {self.opt} wants second derivatives, which train_step does not make; take one of the "
                "first order, such as optim.opt=nadamw"
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


class KnobConfig(Strict):
    """A scheduled value that a task reads by name: from `start` to `end` over the run, by a curve."""

    start: float
    end: float
    curve: Literal["cosine", "linear", "constant"]


class _Schedule(Strict):
    """What every schedule has. `warmup_steps` wins over `warmup_epochs` when set."""

    warmup_epochs: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)] | None
    knobs: dict[str, KnobConfig]


class CosineConfig(_Schedule):
    """Linear warm-up, then half a cosine from lr to min_lr; weight decay likewise to weight_decay_end, if set."""

    name: Literal["cosine"]
    min_lr: Annotated[float, Field(ge=0)]
    weight_decay_end: Annotated[float, Field(ge=0)] | None


class ConstantConfig(_Schedule):
    """Linear warm-up, then lr."""

    name: Literal["constant"]


class OneCycleConfig(Strict):
    """Smith's one-cycle policy: up from lr / div_factor, down to lr / div_factor / final_div_factor; momentum opposite.

    Source: Smith, Topin, arXiv:1708.07120; the two-phase cosine form of torch.optim.lr_scheduler.OneCycleLR.
    """

    name: Literal["onecycle"]
    peak_fraction: Annotated[float, Field(gt=0, lt=1)]
    div_factor: Annotated[float, Field(ge=1)]
    final_div_factor: Annotated[float, Field(ge=1)]
    momentum_low: Beta
    momentum_high: Beta
    knobs: dict[str, KnobConfig]


ScheduleConfig = Annotated[CosineConfig | ConstantConfig | OneCycleConfig, Field(discriminator="name")]
