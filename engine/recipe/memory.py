"""`runtime.memory_gib`: predict the memory of SDXL's training on meta tensors, and choose what makes it fit.

The forward and backward pass of the U-Net runs on tensors without memory, whose bytes are counted while they live.
Gradients, the copies of autocast and the optimiser's state are added as if they met that peak. Not counted: fragments,
workspaces of kernels, the pass of trained text encoders, pictures and the filling of caches.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.latents.buckets import BucketConfig
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
from utils.io.safe_text import Lines
from utils.record.logging import get_logger

log = get_logger(__name__)

_GIB = 2**30
_LIBRARIES_GIB = 0.8  # CUDA's context and its libraries; an estimate
# Settings from the cheapest to the dearest: key, value, its price.
_LADDER = (
    ("runtime.grad_checkpointing", True, "a third more time"),
    ("runtime.offload", True, "text encoders and VAE move to the GPU for each use"),
    ("optim.fused_backward", True, "the same updates"),
    ("model.frozen_dtype", "float8", "3 bits of mantissa in the base"),
    ("optim.bf16_weights", True, "weights rounded stochastically"),
)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations create. peak: the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = _storages(output)
        for key in made.keys() - _storages((args, kwargs)).keys() - self._known:  # no views, such as of weights
            size = made[key].nbytes()
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(made[key], self._free, key, size)
        return output

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in storages}


class _KernelAttention(TorchFunctionMode):
    """Replace the attention of meta tensors, which keeps whole matrices, by a kernel that does not, as on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _with_kernel(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with _KernelAttention():  # here, as a backward pass that computes again has no modes of its caller
            return forward(*args, **kwargs)

    return run


def predict_memory(config: TrainingConfig, precision: str) -> dict[str, float]:
    """Return the bytes of a training step by part."""
    samples = config.task.samples.model_copy(update={"prompts": []})
    plain = config.task.model_copy(update={"samples": samples, "judge": None, "tag_weights": None})
    with torch.device("meta"):
        task = DiffusionTask(Setup(config.model, plain))
        task.load_helpers("training")
    task.train()
    is_bf16 = getattr(config.optim, "bf16_weights", False)
    is_fused = getattr(config.optim, "fused_backward", False)
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    sizes = [parameter.nbytes // (2 if is_bf16 else 1) for parameter in parameters]
    weights = sum(sizes)
    away = task.offloaded if config.runtime.offload else ()
    helpers = networks_of(task, [name for name in task.helpers if name not in away]).values()
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    copies = task.unet.dtype == torch.float32 != compute
    parts = {
        "frozen networks": sum(tensor.nbytes for network in helpers for tensor in network.state_dict().values()),
        "weights": weights,
        "gradients": max(sizes) if is_fused else weights,
        "optimiser state": _state_share(config.optim) * weights,
        "averages": 0 if config.loop.ema_decay is None else weights,
        "copies of autocast": 0,
    }
    if copies and not is_bf16:
        parts["copies of autocast"] = 2 * sum(parameter.numel() for parameter in task.unet.parameters())
    if copies:
        nn.Module.to(task.unet, compute)
    if config.runtime.grad_checkpointing:
        recompute_blocks(task, ("unet",))
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    parts["activations"] = _count_pass(task, config)
    return parts | {"libraries": _LIBRARIES_GIB * _GIB}


def _count_pass(task: DiffusionTask, config: TrainingConfig) -> int:
    """Return the bytes of a pass over a micro-batch of the largest bucket, as a square unless sizes are listed."""
    loop = config.loop
    unet = task.unet.config
    height, width = _largest_size(config.task.buckets)
    size = loop.batch_size if loop.micro_batch_size == "auto" else min(loop.micro_batch_size, loop.batch_size)
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    shapes = ((CHANNELS, height // 8, width // 8), (), (LENGTH, unet.cross_attention_dim), (pooled,), (6,))
    for module in task.unet.modules():
        if hasattr(module, "set_processor"):  # an attention of diffusers
            module.forward = _with_kernel(module.forward)
    with LiveBytes() as live:
        inputs = [torch.empty(size, *shape, device="meta") for shape in shapes]
        task.predict(*inputs).square().mean().backward()
    return live.peak


def _largest_size(buckets: BucketConfig) -> Sequence[int]:
    if buckets.sizes_hw:
        return max((size for sizes in buckets.sizes_hw for size in sizes), key=math.prod)
    side = int(max(buckets.areas_px) ** 0.5) // 32 * 32
    return side, side


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
    parts = predict_memory(config, precision)
    lines: list[str] = []
    for key, value, cost in _LADDER:
        before = _in_gib(parts)
        if before <= limit:
            break
        group, name = key.split(".")
        values = config.model_dump()
        if key in given or values[group].get(name, value) == value:
            continue
        values[group][name] = value
        try:
            changed = validate(values, type(config))
            changed.check_fused(precision, world_size)
        except (ConfigError, UserError) as error:  # such as a fused pass with accumulation: the error says what to set
            lines += [f"not {key}: {error}"] * (name == "fused_backward")
            continue
        if name == "bf16_weights" and precision != "bf16":
            continue
        found = predict_memory(changed, precision)
        after = _in_gib(found)
        if after < before:
            config = changed
            parts = found
            lines.append(f"{key}={str(value).lower()}: {before:.1f} -> {after:.1f} GiB, for {cost}")
    needed = _in_gib(parts)
    shown = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size >= 0.01 * _GIB)
    title = f"runtime.memory_gib={limit:g}: a step takes about {needed:.2f} GiB: {shown}"
    log.info("%s", Lines("\n  ".join([title, *lines])))
    if needed > limit:
        raise UserError(
            f"runtime.memory_gib: {limit:g}, but the least is about {needed:.1f} GiB ({shown}); set smaller "
            "loop.micro_batch_size or task.buckets.areas_px, task.text_cache, task.lora, or optim=adafactor"
        )
    return config


def _in_gib(parts: Mapping[str, float]) -> float:
    return sum(parts.values()) / _GIB
