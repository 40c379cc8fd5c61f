"""Build optimisers from the configuration."""

from importlib.util import find_spec

import torch

from optim.adan import Adan
from optim.config import AdamW8bitConfig, AdamWConfig, AdanConfig, OptimConfig, SGDConfig, TimmOptimConfig
from optim.stochastic import StochasticAdamW
from utils.errors import UserError

# timm's optimisers that work element by element: steps on rows of a parameter are the steps on the whole. Others use
# norms of whole parameters, factored moments or random draws (tests/optim/test_optimizers.py tries each).
ELEMENTWISE = frozenset(
    (
        *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adamwlegacy", "adan", "adanw"),
        *("adopt", "adoptc", "adoptw", "laprop", "lapropc", "lion", "lionc", "madgrad", "madgradw", "momentum"),
        *("nadam", "nadamc", "nadamlegacy", "nadamw", "nesterov", "nesterovw", "radabelief", "radam", "radamlegacy"),
        *("radamw", "rmsprop", "rmsproptf", "rmsproptfc", "rmsproptfw", "sgd", "sgdc", "sgdw"),
    )
)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimiser itself skips a step where `found_inf` is 1, without a host synchronisation."""
    return isinstance(optimizer, Adan | StochasticAdamW) or any(group.get("fused") for group in optimizer.param_groups)


def check_installed(config: OptimConfig) -> None:
    """Raise UserError where the optimiser's package is missing."""
    if isinstance(config, AdamW8bitConfig) and find_spec("bitsandbytes") is None:
        raise UserError(
            "optim.name: adamw8bit is of the package bitsandbytes, which is not installed; run `pip install "
            "bitsandbytes`, or set optim=adamw"
        )


def check_shardable(config: OptimConfig) -> None:
    """Raise UserError where the optimiser cannot step on some rows of a parameter, as `runtime.parallel=fsdp` needs."""
    opt = config.opt if isinstance(config, TimmOptimConfig) else config.name
    if isinstance(config, AdamW8bitConfig) or (isinstance(config, TimmOptimConfig) and opt not in ELEMENTWISE):
        raise UserError(
            f"runtime.parallel: fsdp gives each rank some rows of every parameter, and optim.opt={opt} is not "
            "known to work element by element; set runtime.parallel=ddp, or another optimiser, such as optim=adamw, "
            "optim=adan or optim.opt=nadamw"
        )


def build_optimizer(config: OptimConfig, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """Build the optimiser over groups of `build_groups`; lr is the peak learning rate before a group's scale."""
    match config:
        case AdamWConfig():
            if config.bf16_weights:
                return StochasticAdamW(groups, lr, tuple(config.betas), config.eps)
            return torch.optim.AdamW(groups, lr=lr, betas=tuple(config.betas), eps=config.eps, fused=True)
        case AdamW8bitConfig():
            check_installed(config)
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, lr=lr, betas=tuple(config.betas), eps=config.eps)
        case AdanConfig():
            return Adan(groups, lr=lr, betas=tuple(config.betas), eps=config.eps)
        case SGDConfig():
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
            # torch makes the buffers in the first step, and would leave them uninitialised if that step is skipped.
            # Without momentum too: a one-cycle schedule sets one.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case TimmOptimConfig():
            import timm.optim

            if "muon" in config.opt:
                from optim.muon import avoid_slow_bf16

                avoid_slow_bf16()
            made = timm.optim.get_optimizer_class(config.opt, bind_defaults=True)
            return made(groups, lr=lr, **config.extra)
