"""Fit heads to frozen features in seconds: of a new classifier (`task.head=fitted`), or of new tags (`task.append_to`).

A new classifier gets the head of a linear probe. A random head sends random gradients into a trained
network for hundreds of steps. After training without labels, features also differ little between images, and a head
learns small differences slowly. A layer norm directly before the head therefore gets the scale and shift with which
each feature has mean 0 and standard deviation 1.

Source: Kumar et al. 2022 (arXiv 2202.10054), linear probing before fine-tuning; standardised features, He et al. 2021
(arXiv 2111.06377), section A.1. Differs: the probe is a regression whose penalty predicts left-out images best, and the
norm is an affine map.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from data.open import Data
from data.stream.loader import no_fields
from data.tags.tag_index import TagIndex
from engine.fold import fold_norms
from engine.measures.probe import gather_features
from engine.tasks.kind import ImageTask, Setup
from engine.update.runtime import Runtime
from models.image_model import ImageModel, find_head
from optim.linear import fit_logits
from optim.ridge import standardise
from utils.contracts import Batch
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import log

_FEW_EPOCHS = 2.5  # docs/results.md#from-weights-in-two-minutes


@torch.no_grad()
def fit_head(task: ImageTask, loader: Iterable[Batch], runtime: Runtime, epochs: float = 0.0) -> None:
    """Standardise the head's input over the loader's images, and fit the head to their labels (`task.fit`).

    epochs: of training on these images before; after many, the head becomes the mean of the trained and the fitted one.
    All ranks call it with equal batch sizes and get the same head. Raises UserError if no image could be read, or if
    the network does not end in one linear layer.
    """
    again = epochs >= _FEW_EPOCHS
    activations = {}  # outputs of layer norms by name, and the input of the head
    networks = []  # the one that computes features, once there are images
    task.to(runtime.device).eval()

    def see(name: str, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        activations[name] = output

    def embed(batch: Batch) -> tuple[Tensor, Batch]:
        images = task.normalise(batch["images"])
        if not networks:
            networks.append(fold_norms(task.network, images[:1]))
            for name, module in networks[0].named_modules():
                if isinstance(module, nn.LayerNorm) and module.bias is not None:
                    module.register_forward_hook(partial(see, name))
            find_head(networks[0]).register_forward_pre_hook(lambda head, inputs: activations.update({"": inputs[0]}))
        with runtime.autocast():
            networks[0](images)
        return activations[""], batch

    features, labels = gather_features(map(embed, loader))
    task.train()
    if len(features) == 0 or not features.isfinite().all():
        raise UserError(
            f"task.head: {len(features)} images could be read to fit the head, or their features are not finite; "
            "set task.head=random"
        )
    head = find_head(task.network)
    mean, scale = standardise(features)
    weight, bias, loss, quality = distributed.rank_zero_call(
        lambda: task.fit((features - mean) / scale, labels, head.out_features, again)
    )
    # Layers between norm and head (dropout, flatten) return their input, so the norm's output shares its memory.
    inputs = activations.pop("")
    name = next((name for name, output in activations.items() if output.flatten(1).is_set_to(inputs)), None)
    if again or name is None:
        weight = weight / scale
        bias = bias - weight @ mean
    else:
        # A constant feature (infinite scale) is left unchanged; the head gives it no weight.
        is_constant = scale.isinf()
        mean[is_constant] = 0.0
        scale[is_constant] = 1.0
        norm = task.network.get_submodule(name)
        norm.weight.copy_(norm.weight.cpu() / scale)
        norm.bias.copy_((norm.bias.cpu() - mean) / scale)
    for own, fitted in ((head.weight, weight), (head.bias, bias)):
        own.lerp_(fitted.to(own), 0.5 if again else 1.0)
    log.info(
        "task.head: fitted to %s images; leave-one-out loss %.3f, %s %.3f",
        f"{len(labels):,}", loss, task.best_metric, quality,
    )  # fmt: skip


@torch.no_grad()
def fit_new_tags(task: ImageTask, data: Data, rows: np.ndarray, index: TagIndex, setup: Setup) -> None:
    """Append tags to a frozen tagger (`task.append_to`): a logistic regression for a new tag becomes a row of the head.

    The tags after those of `old_tags` are new. Nothing else of the network changes, and all ranks get the same head.
    Raises UserError (`task.append_to`) if there are not enough images.
    """
    model = ImageModel(task.network, task.normalise, "tags").to(data.machine.device).eval()
    features, ids = gather_features(
        (model.embed(batch["images"]), batch | {"labels": batch["sample_id"]})
        for batch in data.prepared(rows, no_fields, setup.preprocessing)
    )
    task.train()
    first = sum(setup.facts["old_tags"])
    rows = ids.numpy()
    if len(rows) < 2:
        raise UserError(f"task.append_to: {len(rows)} images could be read to fit the new tags; give two or more")
    head = find_head(task.network)
    targets = torch.zeros(len(rows), head.out_features, dtype=torch.float64)
    for number, row in enumerate(rows.tolist()):
        targets[number, index.unknown_of(row)] = torch.nan
        targets[number, index.of_row(row)] = 1.0
    mean, scale = standardise(features)
    weight, bias = distributed.rank_zero_call(lambda: fit_logits((features - mean) / scale, targets[:, first:]))
    weight = weight / scale
    head.weight[first:] = weight
    head.bias[first:] = bias - weight @ mean
    log.info("task.append_to: %d new tags, fitted to %s images", len(weight), f"{len(rows):,}")
