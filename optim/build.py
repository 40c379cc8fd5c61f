"""From configuration to optimiser: one visible table."""

import torch
from torch import nn

from optim.adan import Adan
from optim.config import AdamWConfig, AdanConfig, OptimConfig, SGDConfig, TimmOptimConfig
from utils.errors import UserError


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimiser itself leaves out a step where `found_inf` is 1, without asking the host."""
    return isinstance(optimizer, Adan) or any(group.get("fused") for group in optimizer.param_groups)


def check_shardable(config: OptimConfig) -> None:
    """Raise UserError where a rank that holds some rows of a parameter could not make the optimiser's step on them.

    Found out by trying: three steps on halves of a matrix, a kernel and a vector must be those on the whole. Norms of
    a whole parameter, factored moments and random draws differ; so would state that is not shaped like its parameter.
    """
    if not isinstance(config, TimmOptimConfig):  # tests/optim/test_optimizers.py tries the others
        return
    if not steps_on_rows(config):
        raise UserError(
            f"runtime.parallel: fsdp gives each rank some rows of every parameter, and optim.opt={config.opt} must see "
            "a parameter as a whole; set runtime.parallel=ddp, or an optimiser that works element by element, such as "
            "optim=adamw, optim=adan or optim.opt=nadamw"
        )


def steps_on_rows(config: OptimConfig) -> bool:
    """Return whether steps on the rows of parameters, two halves each by itself, are the steps on the whole."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator) for shape in ((64, 48), (64, 32, 3, 3), (64,))]
    gradients = [[torch.randn(whole.shape, generator=generator) for whole in wholes] for _ in range(3)]
    runs = []
    for count in (1, 2):
        parts = [[nn.Parameter(part.clone()) for part in whole.chunk(count)] for whole in wholes]
        groups = [{"params": sum(parts, []), "weight_decay": 0.05}]
        optimizer = build_optimizer(config, groups, 0.01)
        for step in gradients:
            for own, gradient in zip(parts, step):
                for part, rows in zip(own, gradient.chunk(count)):
                    part.grad = rows.clone()
            optimizer.step()
        for part in groups[0]["params"]:
            state = [value for value in optimizer.state[part].values() if isinstance(value, torch.Tensor)]
            if any(value.ndim > 0 and value.shape != part.shape for value in state):
                return False
        runs.append([torch.cat([part.detach() for part in own]) for own in parts])
    return all(torch.allclose(one, other, rtol=1e-6, atol=1e-6) for one, other in zip(*runs))


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
            import timm.optim

            made = timm.optim.get_optimizer_class(config.opt, bind_defaults=True)
            try:
                return made(groups, lr=lr, **config.extra)
            except (TypeError, ValueError) as error:
                arguments = ", ".join(config.extra_arguments())
                raise UserError(
                    f"optim.extra: timm's {config.opt} cannot be made with {config.extra} ({error}); set another of "
                    f"its arguments: {arguments}"
                ) from error
