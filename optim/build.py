"""From configuration to optimiser: one visible table."""

import timm.optim
import torch

from optim.adan import Adan
from optim.config import AdamWConfig, AdanConfig, OptimConfig, SGDConfig, TimmOptimConfig
from utils.errors import UserError


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimiser itself leaves out a step where `found_inf` is 1, without asking the host."""
    return isinstance(optimizer, Adan) or any(group.get("fused") for group in optimizer.param_groups)


def build_optimizer(config: OptimConfig, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """Build the optimiser over groups of `build_groups`; lr is the peak rate before a group's scale."""
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=lr, betas=tuple(config.betas), eps=config.eps, fused=True)
        case AdanConfig():
            return Adan(groups, lr=lr, betas=tuple(config.betas), eps=config.eps)
        case SGDConfig():
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
            # A first step that is left out would leave torch's lazily made buffers uninitialised. Without momentum too:
            # a one-cycle schedule sets one.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case TimmOptimConfig():
            made = timm.optim.get_optimizer_class(config.opt, bind_defaults=True)
            try:
                return made(groups, lr=lr, **config.extra)
            except (TypeError, ValueError) as error:
                arguments = ", ".join(config.extra_arguments())
                raise UserError(
                    f"optim.extra: timm's {config.opt} cannot be made with {config.extra} ({error}); set another of "
                    f"its arguments: {arguments}"
                ) from error
