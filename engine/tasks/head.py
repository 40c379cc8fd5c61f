"""Fit a new head like a linear probe (`task.head=fitted`), in closed form, in seconds.

A random head sends random gradients into a trained network for hundreds of steps. After training without labels,
features also differ little between images, and a head learns small differences slowly. A layer norm directly before the
head therefore gets the scale and shift with which each feature has mean 0 and standard deviation 1.

Source: Kumar et al. 2022 (arXiv 2202.10054), linear probing before fine-tuning; standardised features, He et al. 2021
(arXiv 2111.06377), section A.1. Differs: the probe is a ridge regression, scaled to minimise the cross-entropy of
held-out images, and the norm is an affine map.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.measures.probe import gather_features
from engine.tasks.kind import ImageTask
from engine.update.runtime import Runtime
from models.image_model import find_head
from optim.linear import fit_classes
from optim.ridge import standardise
from utils.contracts import Batch
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)


@torch.no_grad()
def fit_head(task: ImageTask, loader: Iterable[Batch], runtime: Runtime) -> None:
    """Standardise the head's input over the loader's images, and fit the head to their labels by ridge regression.

    All ranks call it with equal batch sizes and get the same head. Raises UserError if no image could be read, or if
    the network does not end in one linear layer.
    """
    network = task.network
    head = find_head(task.network)
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm) and module.bias is not None]
    seen = {}  # outputs of layer norms, and the head's input
    hooks = [norm.register_forward_hook(lambda norm, _, output: seen.update({norm: output})) for norm in norms]
    hooks.append(head.register_forward_pre_hook(lambda head, inputs: seen.update({head: inputs[0]})))
    task.to(runtime.device).eval()

    def embed(batch: Batch) -> tuple[Tensor, Batch]:
        with runtime.autocast():
            network(task.normalise(batch["images"]))
        return seen[head], batch

    features, labels = gather_features(map(embed, loader))
    for hook in hooks:
        hook.remove()
    task.train()
    if len(features) == 0 or not features.isfinite().all():
        raise UserError(
            f"task.head: {len(features)} images could be read to fit the head, or their features are not finite; "
            "set task.head=random"
        )
    mean, scale = standardise(features)
    weight, bias, loss, accuracy = distributed.rank_zero_call(
        lambda: fit_classes((features - mean) / scale, labels, head.out_features)
    )
    # Layers between norm and head (dropout, flatten) return their input, so the norm's output shares its memory.
    inputs = seen.pop(head)
    norm = next((norm for norm, output in seen.items() if output.flatten(1).is_set_to(inputs)), None)
    if norm is None:
        weight = weight / scale
        bias = bias - weight @ mean
    else:
        # A constant feature (infinite scale) is left unchanged; the head gives it no weight.
        is_constant = scale.isinf()
        mean[is_constant] = 0.0
        scale[is_constant] = 1.0
        norm.weight.copy_(norm.weight.cpu() / scale)
        norm.bias.copy_((norm.bias.cpu() - mean) / scale)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    log.info(
        "task.head: fitted to %s images; leave-one-out loss %.3f, accuracy %.3f", f"{len(labels):,}", loss, accuracy
    )
