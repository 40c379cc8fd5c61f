"""`runtime.memory_gib`: predict the memory of SDXL's training on fake tensors, and choose what makes it fit.

The forward and backward pass of the U-Net runs on tensors without memory, whose bytes are counted while they live.
Gradients, the copies of autocast and the optimiser's state are added to that peak. The prediction does not count
fragments, workspaces of kernels, the passes of text encoders, and the copy of the
weights while their averages are evaluated.
"""

import math
import weakref
from itertools import chain
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import TrainingConfig
from engine.task import networks_of
from engine.tasks.change import AnyConfig, Start
from engine.tasks.kind import Setup
from engine.update.parallel import recompute_blocks
from optim.alone import step_each
from optim.build import build_optimizer
from optim.config import OptimConfig
from sdxl.config import CHANNELS
from sdxl.files.tokenizer import LENGTH
from sdxl.task import DiffusionTask
from utils.contracts import Figures
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import log

_GIB = 2**30
LIBRARIES_GIB = 0.8  # CUDA's context and its libraries; an estimate
# Bytes for each pixel of an image, counted at 1024 x 1024 px and SDXL's own sizes: the U-Net without gradients in
# bfloat16, and the VAE in float32.
FORWARD = 225
ENCODE = 2575
DECODE = 3073
# Settings from the cheapest to the dearest.
_LADDER = {
    "runtime.grad_checkpointing": True,
    "runtime.offload": True,
    "optim.fused_backward": True,
    "model.frozen_dtype": "int8",
    "optim.bf16_weights": True,
}


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operations create. peak: the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._sizes = {}

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


def predict_memory(config: TrainingConfig, precision: str) -> Figures:
    """Return the GiB of a `step`, of `evaluation`, of `encoding` images, and of `pictures` if any are drawn."""
    with torch.device("meta"):
        task = DiffusionTask(Setup(config.model, config.task))
        task.load_helpers("training")
    task.train()
    is_bf16 = getattr(config.optim, "bf16_weights", False)
    sizes = [each.nbytes // (2 if is_bf16 else 1) for each in task.parameters() if each.requires_grad]
    weights = sum(sizes)
    away = task.offloaded if config.runtime.offload else ()
    frozen = {
        name: sum(tensor.nbytes for tensor in network.state_dict().values())
        for name, network in networks_of(task, task.helpers).items()
    }
    vae = frozen.pop("vae")
    texts = sum(frozen.pop(name) for name in {*away} - {"vae"})  # on the device for a while
    stays = sum(frozen.values()) + weights * (1 + _state_share(config.optim))
    gradients = max(sizes) if getattr(config.optim, "fused_backward", False) else weights
    if config.loop.ema_decay is not None:
        stays += weights
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if task.unet.dtype == torch.float32 != compute:
        if not is_bf16:  # the copies of autocast
            stays += 2 * sum(parameter.numel() for parameter in task.unet.parameters())
        nn.Module.to(task.unet, compute)
    if config.runtime.grad_checkpointing:
        recompute_blocks(task, ("unet",))
    step, pixels = _count_pass(task, config, compute)
    trains = stays if "vae" in away else stays + vae
    parts = {"step": trains + gradients + max(texts, step), "encoding": vae + pixels * ENCODE}
    parts["evaluation"] = trains + max(texts, config.loop.at_once * pixels * FORWARD)
    if not config.task.latent_cache:
        parts["encoding"] += stays
    samples = config.task.samples
    if samples.prompts:
        parts["pictures"] = stays + vae + DECODE * math.prod(samples.image_size_hw)
    return {name: size / _GIB + LIBRARIES_GIB for name, size in parts.items()}


def _count_pass(task: DiffusionTask, config: TrainingConfig, compute: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a pass over a micro-batch of the largest bucket, and its pixels.

    The bucket is a square unless sizes are listed. Gradients are freed at once. Tensors are fake ones of the CPU:
    attention then takes a kernel that keeps no matrix of weights, as on a GPU; meta tensors have none. Norms give
    float32, as in CUDA's autocast.
    """
    unet = task.unet.config
    buckets = config.task.buckets
    height = width = int(max(buckets.areas_px) ** 0.5) // 32 * 32
    if buckets.sizes_hw:
        height, width = max(chain(*buckets.sizes_hw), key=math.prod)
    size = min(config.loop.at_once, config.loop.batch_size)
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    shapes = ((CHANNELS, height // 8, width // 8), (), (LENGTH, unet.cross_attention_dim), (pooled,), (6,))
    casts = compute != torch.float32
    for module in task.unet.modules():
        if casts and isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()
            module.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    with FakeTensorMode(allow_non_fake_inputs=True):
        task.to_empty(device="cpu")
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        with LiveBytes() as live:
            inputs = [torch.empty(size, *shape) for shape in shapes]
            with torch.autocast("cpu", compute, enabled=casts):
                passes = [task.predict(*inputs) for _ in range(1 + bool(config.task.class_words))]
            torch.cat(passes).square().mean().backward()
    return live.peak, height * width


def _state_share(config: OptimConfig) -> float:
    """Return the size of the optimiser's state as a multiple of the weights'."""
    if getattr(config, "opt", "").endswith("8bit"):  # for GPUs alone
        return 0.5
    dtype = torch.bfloat16 if getattr(config, "bf16_weights", False) else torch.float32
    parameter = nn.Parameter(torch.ones(256, 256, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(config, [{"params": [parameter], "weight_decay": 0.0}], 0.1)
    step_each(optimizer, torch.zeros(()), 0)
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / parameter.nbytes


def fit_memory(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the config with the settings that make it fit `runtime.memory_gib`, and log the prediction.

    Stated keys keep their values. Raises UserError if nothing suffices.
    """
    limit = config.runtime.memory_gib
    if limit is None:
        return config
    precision = start.runtime.precision
    least = start.job.stated("runtime.memory_gib")
    parts = predict_memory(config, precision)
    for key, value in _LADDER.items():
        is_useless = key == "optim.bf16_weights" and precision != "bf16"
        if max(parts.values()) <= limit or is_useless or start.job.states(key, least):
            continue
        try:
            changed = config.changed({key: value})
            changed.check_fused(precision, distributed.planned_world_size())
        except (ValidationError, UserError):  # such as a fused pass with accumulation, or an optimiser without the key
            continue
        needed = predict_memory(changed, precision)
        if max(needed.values()) < max(parts.values()):
            config = changed
            parts = needed
    sizes = [f"{name} {size:.2f} GiB" for name, size in parts.items()]
    log.info("runtime.memory_gib=%g: %s", limit, ", ".join(sizes))
    greatest = max(parts, key=parts.get)
    if parts[greatest] > limit:
        raise UserError(
            f"runtime.memory_gib: {limit:g}, but {greatest} takes about {parts[greatest]:.1f} GiB; set "
            "task.samples.prompts=[], task.text_cache, task.lora, optim=adafactor, or smaller loop.micro_batch_size, "
            "task.buckets.areas_px or task.samples.image_size_hw"
        )
    return config
