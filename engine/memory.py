"""The memory of a rank by part: what the tensors of a learner take, and how much of a GPU's peak is beyond them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.learner import Learner
from engine.task import frozen_networks
from utils.ranks.sharded import own_part


def memory_by_part(learner: Learner) -> dict[str, float]:
    """Return GiB by part, as they are after an update; without parts of 0 GiB.

    Gradients count as in the backward pass; they are freed after it. On a GPU, `peak` is the most that was allocated so
    far, and `activations` is the rest of it, beside the other parts on the GPU. An average in the host's memory is
    `averages on the host`.
    """
    task, device = learner.task, learner.runtime.device
    frozen = _tensors_of(frozen_networks(task).values())
    known = {id(tensor) for tensor in frozen}
    weights = [tensor for tensor in _tensors_of([task]) if id(tensor) not in known]
    averages = [] if learner.averages is None else list(learner.averages.tensors().values())
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    parts = {
        "weights": weights,
        "gradients": [parameter for group in learner.optimizer.param_groups for parameter in group["params"]],
        "optimiser state": [value for value in states if isinstance(value, Tensor)],
        "averages": [tensor for tensor in averages if tensor.device.type == device.type],
        "frozen networks": frozen,
    }
    found = {name: sum(own_part(tensor).nbytes for tensor in tensors) / 2**30 for name, tensors in parts.items()}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        found |= {"activations": peak - sum(found.values()), "peak": peak}
    host = [tensor for tensor in averages if tensor.device.type != device.type]
    found["averages on the host"] = sum(tensor.nbytes for tensor in host) / 2**30
    return {name: gib for name, gib in found.items() if gib > 0}


def show_memory(parts: dict[str, float]) -> str:
    """Return the parts in a line: `weights 9.56 GiB, gradients 812.0 MiB`."""
    sizes = {name: f"{gib:.2f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB" for name, gib in parts.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of modules."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
