"""How ranks work on one task: each holds all of it (`ddp`), or each holds some rows of every parameter (`fsdp`).

`ddp` is torch's DistributedDataParallel. `fsdp` is torch's fully_shard: a rank holds some rows of every parameter, of
its gradient, of the optimiser's state and of the average, and all-gathers a unit's parameters only while the unit is
computed: in its forward call. A network must therefore call its blocks and not read their weights from outside; one
that does fails ("mixed torch.Tensor and DTensor"). Optimiser, clipping and average work on the rows that a rank holds,
as plain tensors (utils/ranks/sharded.py), with the kernels and arithmetic of a single process.
"""

import inspect
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from engine.config import RuntimeConfig
from engine.runtime import Runtime, choose_compile
from engine.task import StepOutput, Task, networks_of
from utils.errors import UserError
from utils.ranks import distributed, sharded
from utils.ranks.sharded import Part
from utils.record.logging import get_logger

log = get_logger(__name__)

# A stacked module with a smaller share of all parameters is not worth its own collectives.
_UNIT_SHARE = 1 / 256
_STACKS = (nn.Sequential, nn.ModuleList)

_pytree.register_dataclass(StepOutput)  # torch before 2.15 finds the loss in it by this alone


def wrap_task(task: Task, config: RuntimeConfig, total_steps: int, runtime: Runtime) -> nn.Module:
    """Move the task to the device, wrap it for the ranks and compile it; returns what train_step calls.

    Raises UserError where `runtime` asks for what the task does not support.
    """
    _change_layers(task, config, runtime)
    compiles = choose_compile(config, runtime.device.type, total_steps)
    if compiles:
        log.info("compiling the task (the first steps take longer)")
        torch.compiler.reset()  # of an earlier run of this process: its shapes would count as dynamic ones
        torch._dynamo.config.recompile_limit = 64  # units share their code: one compilation for each shape of a unit
    if config.parallel == "fsdp" and distributed.is_distributed():
        return _shard(task, runtime, compiles)  # moves one unit after another to the device
    task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)
    if compiles:
        task.compile()
    if not distributed.is_distributed():
        return task
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    # Learner.sync_buffers broadcasts buffers where they are read. torch 2.14 has a new name for the setting.
    names = inspect.signature(DistributedDataParallel).parameters
    setting = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in names)
    return DistributedDataParallel(task, device_ids=ids, gradient_as_bucket_view=True, **{setting: False})


def _change_layers(task: Task, config: RuntimeConfig, runtime: Runtime) -> None:
    """Change the networks' layers as `runtime` asks."""
    if config.sync_batchnorm and distributed.is_distributed():
        if runtime.device.type != "cuda":
            raise UserError("runtime.sync_batchnorm: true needs GPUs (torch has no CPU form); set it to false")
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activation of timm's BatchNormAct2d

        for name, network in networks_of(task, task.trained).items():
            task.set_submodule(name, convert_sync_batchnorm(network))
    # Else helpers, such as a LoRA's U-Net, which gradients pass through.
    if config.grad_checkpointing and not (_recompute(task, task.trained) or _recompute(task, task.helpers)):
        raise UserError(
            f"runtime.grad_checkpointing: true, but {', '.join(task.trained)} cannot recompute its blocks; set it to "
            "false"
        )


def _recompute(task: Task, names: Sequence[str]) -> bool:
    """Let networks recompute their blocks in the backward pass; returns whether a library lets any."""
    done = False
    for network in networks_of(task, names).values():
        # As timm (and our networks), diffusers and transformers name it.
        for name in ("set_grad_checkpointing", "enable_gradient_checkpointing", "gradient_checkpointing_enable"):
            if hasattr(network, name):
                with suppress(AssertionError):  # as timm's networks refuse it
                    getattr(network, name)()
                    done = True
    return done


def find_units(task: nn.Module) -> list[nn.Module]:
    """Return the modules that become FSDP units, inner ones first; all else is in the task's own unit.

    A unit is a member of a stack (nn.Sequential, nn.ModuleList) that is neither a stack nor a single layer. It must
    have enough parameters beside those of the units inside it, and share none with modules outside it.
    """
    everything = sum(parameter.numel() for parameter in task.parameters())
    uses = Counter(one for module in task.modules() for one in module._parameters.values() if one is not None)
    stacked = {member for stack in task.modules() if type(stack) in _STACKS for member in stack.children()}
    units: list[nn.Module] = []
    taken: set[nn.Parameter] = set()
    for module in reversed(list(task.modules())):  # inner modules first
        if module not in stacked or type(module) in _STACKS or not any(True for _ in module.children()):
            continue
        own = set(module.parameters()) - taken
        alone = all(uses[parameter] == 1 for parameter in own)
        if alone and own and sum(parameter.numel() for parameter in own) >= _UNIT_SHARE * everything:
            units.append(module)
            taken |= own
    return units


def _shard(task: Task, runtime: Runtime, compiles: bool) -> Task:
    """Shard a task's parameters over the ranks, in place."""
    # Imported here: they take half a second, which other runs need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    total, units = sum(parameter.nbytes for parameter in task.parameters()), find_units(task)
    # Helpers outside units stay whole: in the task's unit they would be gathered for a whole forward and backward pass.
    whole = {one for network in networks_of(task, task.helpers).values() for one in network.parameters()}
    whole -= {parameter for unit in units for parameter in unit.parameters()}
    for parameter in whole:
        parameter.data = parameter.data.to(runtime.device)
    mesh = init_device_mesh(runtime.device.type, (distributed.world_size(),))
    for unit in units:
        if compiles:
            unit.compile(dynamic=False)  # as a symbol, the channels of two units end inductor of torch 2.14 in an error
        fully_shard(unit, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=whole)
    # An evaluation calls parts of the network, not the task: the task's weights are gathered for all of it.
    register_fsdp_forward_method(task, "evaluate")
    own = sum(sharded.own_part(parameter).nbytes for parameter in task.parameters())
    log.info(
        "fsdp: %d units and the rest; %.1f of %.1f MiB of parameters on this rank",
        len(units), own / 2**20, total / 2**20,
    )  # fmt: skip
    return task


def no_sync(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Return the context of a micro-batch: gradients are reduced over ranks only in the last one of a step."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    elif hasattr(model, "no_sync") and not last:
        return model.no_sync()
    return nullcontext()


@torch.no_grad()
def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of an optimiser's parameters; a part takes its gradient from its sharded parameter."""
    for part in parameters:
        if isinstance(part, Part) and part.whole.grad is not None:
            assert part.data_ptr() == sharded.own_part(part.whole).data_ptr(), "the rows have moved"
            part.grad, part.whole.grad = part.whole.grad.to_local(), None
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def is_sharded(model: nn.Module) -> bool:
    """Return whether each rank holds some rows of a module's parameters (torch's FSDPModule)."""
    return hasattr(model, "set_requires_gradient_sync")


def reshard(model: nn.Module) -> None:
    """Free the parameters that were gathered without a backward pass after it, such as in an evaluation."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()
