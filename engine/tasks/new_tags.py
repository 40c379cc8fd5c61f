"""New tags on a frozen tagger (`task.append_to`). A logistic regression for each becomes a row of the head.

Nothing else of the network changes.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.open import Data
from data.stream.loader import no_fields
from data.tags.tag_index import TagIndex
from engine.measures.probe import gather_features
from engine.tasks.kind import ImageTask, Setup
from models.image_model import ImageModel, find_head
from optim.ridge import decompose, standardise
from utils.errors import UserError
from utils.ranks import distributed
from utils.ranks.signals import check_stop
from utils.record.logging import get_logger

log = get_logger(__name__)

_PENALTY = 2.0  # of squared weights, in units of the curvature of a tag's loss
_RARE = 100  # images with a tag, from which the penalty weighs less
_STEPS = 20


@torch.no_grad()
def fit_new_tags(task: ImageTask, data: Data, rows: np.ndarray, index: TagIndex, setup: Setup) -> None:
    """Fit the head's outputs from `known_tags` on to the tags of `rows`; all ranks get the same head.

    Raises UserError (`task.append_to`) if there are not enough images.
    """
    features, found = read_features(task, data, rows, setup)
    first = setup.facts["known_tags"]
    rows = found.numpy()
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


def read_features(task: ImageTask, data: Data, rows: np.ndarray, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return the head's input, float64 [N, C], for those of `rows` whose image can be read, and these rows [N]."""
    model = ImageModel(task.network, task.normalise, "tags").to(data.machine.device).eval()
    found = gather_features(
        (model.embed(batch["images"]), batch | {"labels": batch["sample_id"]})
        for batch in data.prepared(rows, no_fields, setup.preprocessing)
    )
    task.train()
    return found


@torch.enable_grad()
def fit_logits(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [T, C] and bias [T] of logistic regressions of targets [N, T], NaN if unknown, on features [N, C].

    Features are standardised. On the axes of a ridge regression, scaled by its shrinkage, the loss curves about equally
    in all directions, so few steps suffice.
    """
    values, axes = decompose(features)
    shrink = (values / len(features) + _PENALTY).rsqrt()
    rotated = features @ (axes * shrink)
    known = ~targets.isnan()
    share = targets.nanmean(dim=0).nan_to_num()
    # Of a tag's loss at the start. The penalty is in proportion, so it does not outweigh the few images of a rare tag.
    curvature = (share * (1 - share)).clamp(min=1e-6)
    penalty = _PENALTY * _RARE / (targets == 1).sum(dim=0).clamp(min=_RARE)
    weight = torch.zeros(targets.shape[1], rotated.shape[1], dtype=torch.float64, requires_grad=True)
    bias = share.logit(eps=1e-6).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        check_stop(alone=True)
        logits = rotated @ weight.T + bias
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        losses = losses.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)
        loss = (losses / curvature).sum() + (penalty * (weight * shrink).square().sum(dim=1)).sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return (weight.detach() * shrink) @ axes.T, bias.detach()
