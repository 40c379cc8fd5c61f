"""How a new head begins (`task.head`): with standardised features, or where a linear probe of them ends.

The features of a network that was trained without labels, or not at all, differ little: what all images have in common
is many times what tells them apart. A head learns such a difference as slowly as it is small. So where a layer norm
comes just before the head, its scale and shift become those by which each feature has mean 0 and deviation 1 over the
images (`standardised`).

A head of random weights sends random gradients into a network that has learned something, and takes hundreds of steps
to stop. The closed solution takes seconds, and fine-tuning then has nothing to unlearn (`fitted`).

Source: Kumar et al. 2022 (arXiv 2202.10054), linear probing before fine-tuning, which helps most on data of another
kind than that trained on; standardised features, He et al. 2021 (arXiv 2111.06377), section A.1, linear probing.
Differs: the probe is ridge regression, its scale the one of the least cross-entropy, and the norm is an affine map.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.runtime import Runtime
from engine.task import Batch
from engine.tasks.classification import ClassificationTask
from engine.tasks.probe import fit_linear, gather_features, standardise
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

# A smaller one recognises more and leans on directions of the features that hardly vary: training then begins with
# gradients a hundred times as large, which undo it (docs/results.md has a trial).
_PENALTY = 1e-1
_SCALES = tuple(2.0 ** (step / 2) for step in range(33))  # 1 to 65536; a regression's scores lie between 0 and 1


def find_head(network: nn.Module) -> nn.Linear:
    """Return the layer that makes logits. Raises UserError (`task.head`) where it is not a linear layer."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UserError(
            "task.head: standardised and fitted need a network that ends in one linear layer with a bias; "
            f"{type(network).__name__} ends in {type(head).__name__}; set task.head=drawn"
        )
    return head


@torch.no_grad()
def prepare_head(task: ClassificationTask, loader: Iterable[Batch], runtime: Runtime, *, fit: bool) -> None:
    """Standardise what the head is given for the loader's images, and with `fit` fit the head to it.

    The fitted weights are a ridge regression of the classes; without, they stay those drawn. Every rank calls it, with
    batches of the same sizes, and gets the same head. The images must be augmented as in training: a head fitted to
    plain ones is too sure of them, and the first steps tear the network apart. Raises UserError where none could be
    read, or for an unfit network.
    """
    head = find_head(task.network)
    features, labels, norm = _gather(task, head, loader, runtime)
    if len(features) == 0 or not features.isfinite().all():
        raise UserError(
            f"task.head: {len(features)} images could be read to prepare the head for, or their features are not "
            "finite; set task.head=drawn"
        )
    mean, scale = standardise(features)
    weight, bias, said = head.weight.double().cpu(), head.bias.double().cpu(), "drawn"
    if fit:
        standard = (features - mean) / scale
        weight, bias, found = distributed.rank_zero_call(lambda: _fit(standard, labels, head.out_features))
        said = f"fitted, recognises {found:.3f} of them"
    if norm is None:
        weight = weight / scale
        bias = bias - weight @ mean
    else:
        # A constant feature (scale infinite) stays as it is; a fitted head gives it no weight.
        mean, scale = (torch.where(scale.isfinite(), value, other) for value, other in ((mean, 0.0), (scale, 1.0)))
        norm.weight.copy_(norm.weight.cpu() / scale)
        norm.bias.copy_((norm.bias.cpu() - mean) / scale)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    log.info("task.head: its features standardised over %s images; %s", f"{len(labels):,}", said)


def _gather(
    task: ClassificationTask, head: nn.Linear, loader: Iterable[Batch], runtime: Runtime
) -> tuple[Tensor, Tensor, nn.LayerNorm | None]:
    """Return what the head is given [N, C], labels [N], and the layer norm that makes it (None where none does)."""
    task.to(runtime.device).eval()
    made: list[tuple[nn.LayerNorm, Tensor]] = []
    given: list[Tensor] = []
    before: list[nn.LayerNorm] = []

    def note(module: nn.LayerNorm, _: tuple[Tensor, ...], out: Tensor) -> None:
        if out.numel() == len(out) * head.in_features:
            made.append((module, out))

    def encode(images: Tensor) -> Tensor:
        made.clear()
        with runtime.autocast():
            task.network(task.normalise(images))
        features = given.pop()
        # Between the two may stand what passes its input on (dropout, flatten): it is the same memory.
        before[:] = [module for module, out in made if out.data_ptr() == features.data_ptr()]
        return features.float()

    # Layer norms with a scale and a shift; a batch norm standardises by itself, by its batch.
    norms = [module for module in task.network.modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(note) for norm in norms if norm.weight is not None and norm.bias is not None]
    hooks.append(head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])))
    try:
        features, labels = gather_features(encode, loader)
    finally:
        for hook in hooks:
            hook.remove()
        task.train()
    return features, labels, before[0] if before else None


def _fit(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, float]:
    """Return weight [K, C] and bias [K] of a head for standardised features [N, C], and the share recognised."""
    weight, bias = fit_linear(features, F.one_hot(labels, num_classes).double(), [_PENALTY])
    scores = features @ weight + bias
    factor = min(_SCALES, key=lambda factor: float(F.cross_entropy(factor * scores, labels)))
    found = (scores.argmax(dim=1) == labels).double().mean().item()
    return factor * weight.T, factor * bias, found
