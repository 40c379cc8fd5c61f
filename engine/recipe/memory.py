"""`runtime.memory_gib`: predict the memory of SDXL's training on fake tensors, and choose what makes it fit.

The forward and backward pass of the U-Net runs on tensors without memory, whose bytes are counted while they live.
Gradients, the copies of autocast and the optimiser's state are added as if they met that peak. Not counted: fragments,
workspaces of kernels, the pass of trained text encoders, pictures and the filling of caches.
"""

import math
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import TrainingConfig
from engine.task import networks_of
from engine.tasks.diffusion import DiffusionTask
from engine.tasks.kind import Setup
from engine.update.parallel import recompute_blocks
from models.sdxl.family import CHANNELS
from models.sdxl.tokenizer import LENGTH
from optim.alone import step_each
from optim.build import build_optimizer
from optim.config import OptimConfig
from utils.config.messages import ConfigError, validate
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

_GIB = 2**30
_LIBRARIES_GIB = 0.8  # CUDA's context and its libraries; an estimate
# Settings from the cheapest to the dearest.
_LADDER = (
    ("runtime", "grad_checkpointing", True),
    ("runtime", "offload", True),
    ("optim", "fused_backward", True),
    ("model", "frozen_dtype", "float8"),
    ("optim", "bf16_weights", True),
)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations create. peak: the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(output).items():
            if key in given or key in self._sizes:  # a view, such as of weights
                continue
            self._sizes[key] = storage.nbytes()
            self._live += self._sizes[key]
            weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._live)
        return output

    def _free(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in storages}


def predict_memory(config: TrainingConfig, precision: str) -> float:
    """Return the GiB of a training step."""
    with torch.device("meta"):
        task = DiffusionTask(Setup(config.model, config.task.model_copy(update={"judge": None})))
        task.load_helpers("training")
    task.train()
    is_bf16 = getattr(config.optim, "bf16_weights", False)
    sizes = [each.nbytes // (2 if is_bf16 else 1) for each in task.parameters() if each.requires_grad]
    weights = sum(sizes)
    away = task.offloaded if config.runtime.offload else ()
    helpers = networks_of(task, [name for name in task.helpers if name not in away]).values()
    total = sum(tensor.nbytes for network in helpers for tensor in network.state_dict().values())
    total += weights * (1 + _state_share(config.optim))
    total += max(sizes) if getattr(config.optim, "fused_backward", False) else weights  # gradients
    if config.loop.ema_decay is not None:
        total += weights
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if task.unet.dtype == torch.float32 != compute:
        if not is_bf16:  # the copies of autocast
            total += 2 * sum(parameter.numel() for parameter in task.unet.parameters())
        nn.Module.to(task.unet, compute)
    if config.runtime.grad_checkpointing:
        recompute_blocks(task, ("unet",))
    return (total + _count_pass(task, config)) / _GIB + _LIBRARIES_GIB


def _count_pass(task: DiffusionTask, config: TrainingConfig) -> int:
    """Return the bytes of a pass over a micro-batch of the largest bucket, as a square unless sizes are listed.

    Gradients are freed at once. Tensors are fake ones of the CPU: attention then takes a kernel that keeps no matrix of
    weights, as on a GPU; meta tensors have none.
    """
    loop = config.loop
    unet = task.unet.config
    buckets = config.task.buckets
    height = width = int(max(buckets.areas_px) ** 0.5) // 32 * 32
    if buckets.sizes_hw:
        height, width = max(chain(*buckets.sizes_hw), key=math.prod)
    size = loop.batch_size if loop.micro_batch_size == "auto" else min(loop.micro_batch_size, loop.batch_size)
    size *= 2 if config.task.preference_beta else 1  # pictures of a pair
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    shapes = ((CHANNELS, height // 8, width // 8), (), (LENGTH, unet.cross_attention_dim), (pooled,), (6,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        task.to_empty(device="cpu")
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        with LiveBytes() as live:
            inputs = [torch.empty(size, *shape) for shape in shapes]
            task.predict(*inputs).square().mean().backward()
    return live.peak


def _state_share(config: OptimConfig) -> float:
    """Return the size of the optimiser's state as a multiple of the weights'."""
    if config.name == "adamw8bit":  # for GPUs alone
        return 0.5
    dtype = torch.bfloat16 if getattr(config, "bf16_weights", False) else torch.float32
    parameter = nn.Parameter(torch.ones(256, 256, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(config, [{"params": [parameter], "weight_decay": 0.0}], 0.1)
    optimizer.update = 0
    step_each(optimizer, torch.zeros(()))
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / parameter.nbytes


def fit_memory(config: TrainingConfig, overrides: Iterable[str], precision: str, world_size: int) -> TrainingConfig:
    """Return the config with the settings that make it fit `runtime.memory_gib`, and log them with the prediction.

    Keys among `overrides`, the words of the command, keep their values. Raises UserError if nothing suffices.
    """
    limit = config.runtime.memory_gib
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    needed = predict_memory(config, precision)
    words = []
    for group, name, value in _LADDER:
        values = config.model_dump()
        key = f"{group}.{name}"
        if needed <= limit or key in given or values[group].get(name, value) == value:
            continue
        if name == "bf16_weights" and precision != "bf16":
            continue
        values[group][name] = value
        try:
            changed = validate(values, type(config))
            changed.check_fused(precision, world_size)
        except (ConfigError, UserError):  # such as a fused pass with accumulation
            continue
        found = predict_memory(changed, precision)
        if found < needed:
            config = changed
            words.append(f"{key}={str(value).lower()}: {needed:.1f} -> {found:.1f}")
            needed = found
    log.info("runtime.memory_gib=%g: a step takes about %.2f GiB; %s", limit, needed, ", ".join(words) or "as set")
    if needed > limit:
        raise UserError(
            f"runtime.memory_gib: {limit:g}, but the least is about {needed:.1f} GiB; set smaller "
            "loop.micro_batch_size or task.buckets.areas_px, task.text_cache, task.lora, or optim=adafactor"
        )
    return config
