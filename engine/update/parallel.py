"""Wrap a task for several ranks: replicated (`ddp`, DistributedDataParallel) or sharded (`fsdp`, fully_shard).

With `fsdp`, a rank holds some rows of every parameter, gradient, optimiser state and average, and all-gathers a unit's
parameters only for the unit's forward and backward calls. A network must therefore call its blocks; reading their
weights from outside fails ("mixed torch.Tensor and DTensor"). Optimiser, clipping and averages work on the rank's rows
as plain tensors (optim/sharded.py), with the same kernels as in a single process.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from engine.config import RuntimeConfig
from engine.task import StepOutput, Task, networks_of
from engine.update.runtime import Runtime
from optim import sharded
from optim.sharded import Part
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

# A module with a smaller share of all parameters is not worth its own collectives.
_UNIT_SHARE = 1 / 256
_STACKS = (nn.Sequential, nn.ModuleList)

_pytree.register_dataclass(StepOutput)  # torch before 2.15 needs this to find the loss


def wrap_task(task: Task, config: RuntimeConfig, runtime: Runtime, *, compiles: bool) -> nn.Module:
    """Move the task to the device, wrap it for the ranks and compile it. Return the module that the learner calls."""
    # Else helpers, such as a LoRA's U-Net: gradients pass through them.
    if config.grad_checkpointing and not (recompute_blocks(task, task.trained) or recompute_blocks(task, task.helpers)):
        raise UserError(
            f"runtime.grad_checkpointing: true, but {', '.join(task.trained)} cannot recompute its blocks; set it to "
            "false"
        )
    if compiles:
        log.info("compiling the task (the first steps take longer)")
        torch.compiler.reset()  # shapes of an earlier run in this process would count as dynamic
        torch._dynamo.config.recompile_limit = 64  # units share code: one compilation for each shape of a unit
    if config.parallel == "fsdp" and distributed.is_distributed():
        return _shard(task, runtime, compiles)  # moves one unit after another to the device
    task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)
    if compiles:
        task.compile()
    if not distributed.is_distributed():
        return task
    # They differ where a dimension has one element, so the gradient's memory is the bucket's.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    # Learner.sync_buffers broadcasts buffers before they are read. torch 2.14 renames this setting.
    names = inspect.signature(DistributedDataParallel).parameters
    setting = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in names)
    return DistributedDataParallel(task, device_ids=ids, gradient_as_bucket_view=True, **{setting: False})


def recompute_blocks(task: Task, names: Sequence[str]) -> bool:
    """Make networks recompute their blocks in the backward pass; return whether any can."""
    done = False
    for network in networks_of(task, names).values():
        # The method's name in timm (and our networks), diffusers and transformers.
        for name in ("set_grad_checkpointing", "enable_gradient_checkpointing", "gradient_checkpointing_enable"):
            if hasattr(network, name):
                with suppress(AssertionError):  # raised by networks of timm that cannot
                    getattr(network, name)()
                    done = True
    return done


def find_units(task: nn.Module) -> list[nn.Module]:
    """Return the modules that become FSDP units, inner ones first. The task is the unit of all other parameters.

    A unit is a member of an nn.Sequential or nn.ModuleList, but no such stack and no single layer. Without its inner
    units, it has at least _UNIT_SHARE of all parameters, and it shares none with other modules.
    """
    total = sum(parameter.numel() for parameter in task.parameters())
    uses = Counter(value for module in task.modules() for value in module._parameters.values() if value is not None)
    stacked = {member for stack in task.modules() if type(stack) in _STACKS for member in stack.children()}
    units = []
    taken = set()
    for module in reversed(list(task.modules())):  # inner modules first
        if module not in stacked or type(module) in _STACKS or not any(True for _ in module.children()):
            continue
        parameters = set(module.parameters()) - taken
        alone = all(uses[parameter] == 1 for parameter in parameters)
        if alone and parameters and sum(parameter.numel() for parameter in parameters) >= _UNIT_SHARE * total:
            units.append(module)
            taken |= parameters
    return units


def _shard(task: Task, runtime: Runtime, compiles: bool) -> Task:
    """Shard a task's parameters over the ranks, in place."""
    # These imports take half a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    total = sum(parameter.nbytes for parameter in task.parameters())
    units = find_units(task)
    # Helpers outside units stay whole: the task's own unit stays gathered for the whole forward and backward pass.
    helpers = networks_of(task, task.helpers).values()
    whole = {parameter for network in helpers for parameter in network.parameters()}
    whole -= {parameter for unit in units for parameter in unit.parameters()}
    for parameter in whole:
        parameter.data = parameter.data.to(runtime.device)
    mesh = init_device_mesh(runtime.device.type, (distributed.world_size(),))
    for unit in units:
        if compiles:
            unit.compile(dynamic=False)  # with symbolic channels, inductor of torch 2.14 fails
        fully_shard(unit, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=whole)
    # An evaluation calls parts of the network, not the task, so the task's own unit is gathered for its duration.
    register_fsdp_forward_method(task, "evaluate")
    local = sum(sharded.own_part(parameter).nbytes for parameter in task.parameters())
    log.info(
        "fsdp: %d units and the rest; %.1f of %.1f MiB of parameters on this rank",
        len(units), local / 2**20, total / 2**20,
    )  # fmt: skip
    return task


def no_sync(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Return the context of a micro-batch: ranks reduce gradients only in the last micro-batch of a step."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    elif hasattr(model, "no_sync") and not last:
        return model.no_sync()
    return nullcontext()


@torch.no_grad()
def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of an optimiser's parameters. Parts take theirs from their sharded parameters."""
    for part in parameters:
        if isinstance(part, Part) and part.whole.grad is not None:
            assert part.data_ptr() == sharded.own_part(part.whole).data_ptr(), "the rows have moved"
            part.grad = part.whole.grad.to_local()
            part.whole.grad = None
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def is_sharded(model: nn.Module) -> bool:
    """Return whether each rank holds some rows of a module's parameters (torch's FSDPModule)."""
    return hasattr(model, "set_requires_gradient_sync")


def reshard(model: nn.Module) -> None:
    """Free the parameters gathered in an evaluation, after which no backward pass frees them."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()
