"""Move a task to the device, compile it, and wrap it for several ranks (DistributedDataParallel)."""

import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.config import RuntimeConfig
from engine.task import Task, networks_of
from engine.update.runtime import Runtime
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import log


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
    task.to(runtime.device)
    if runtime.channels_last:
        task.to(memory_format=torch.channels_last)
    if compiles:
        task.compile()  # traced when DDP calls it, so torch splits the graph at DDP's buckets
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


def no_sync(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Return the context of a micro-batch: ranks reduce gradients only in the last micro-batch of a step."""
    return model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext()
