"""A new head that begins where a linear probe ends: fitted to the frozen features before the first step.

A head of random weights sends random gradients into a network that has learned something, and takes hundreds of steps
to stop. The closed solution takes seconds, and fine-tuning then has nothing to unlearn.

Source: Kumar et al. 2022 (arXiv 2202.10054), linear probing before fine-tuning, which helps most on data of another
kind than that trained on. Differs: the probe is ridge regression, and its scale the one of the least cross-entropy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.runtime import Runtime
from engine.task import Batch
from engine.tasks.classification import ClassificationTask
from engine.tasks.probe import fit_linear, gather_features, standardise
from utils import distributed
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

# A smaller one recognises more and leans on directions of the features that hardly vary: training then begins with
# gradients a hundred times as large, which undo it.
_PENALTY = 1e-2
_SCALES = tuple(2.0 ** (step / 2) for step in range(25))  # 1 to 4096; a regression's scores lie between 0 and 1


def find_head(network: nn.Module) -> nn.Linear:
    """Return the layer that makes logits. Raises UserError (`task.fit_head`) where it is not a linear layer."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UserError(
            f"task.fit_head: true needs a network that ends in one linear layer with a bias; {type(network).__name__} "
            f"ends in {type(head).__name__}; set task.fit_head=false"
        )
    return head


@torch.no_grad()
def fit_head(task: ClassificationTask, loader: Iterable[Batch], runtime: Runtime) -> None:
    """Give the head the weights of a ridge regression of the classes on what it is given for the loader's images.

    Every rank calls it, with batches of the same sizes, and gets the same head. The images must be augmented as in
    training: a head fitted to plain ones is too sure of them, and the first steps tear the network apart. Raises
    UserError where none could be read, or for an unfit network.
    """
    head = find_head(task.network)
    task.to(runtime.device).eval()
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].float()))

    def encode(images: Tensor) -> Tensor:
        with runtime.autocast():
            task.network(task.normalise(images))
        return seen.pop()

    try:
        features, labels = gather_features(encode, loader)
    finally:
        hook.remove()
        task.train()
    weight, bias, found = distributed.rank_zero_call(lambda: _fit(features, labels, head.out_features))
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    log.info("task.fit_head: the head fitted to %s images recognises %.3f of them", f"{len(labels):,}", found)


def _fit(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, float]:
    """Return weight [K, C] and bias [K] of the fitted head, and the share of the images that it recognises."""
    if len(features) == 0 or not features.isfinite().all():
        raise UserError(
            f"task.fit_head: {len(features)} images could be read to fit the head to, or their features are not finite;"
            " set task.fit_head=false"
        )
    mean, scale = standardise(features)
    standard = (features - mean) / scale
    weight, bias = fit_linear(standard, F.one_hot(labels, num_classes).double(), [_PENALTY])
    scores = standard @ weight + bias
    factor = min(_SCALES, key=lambda factor: float(F.cross_entropy(factor * scores, labels)))
    weight = weight / scale[:, None]
    bias = bias - mean @ weight
    return factor * weight.T, factor * bias, (scores.argmax(dim=1) == labels).double().mean().item()
