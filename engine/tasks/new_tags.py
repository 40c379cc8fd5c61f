"""New tags on a frozen tagger (`task.append_to`). A logistic regression for each becomes a row of the head.

Nothing else of the network changes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.open import Data
from data.stream.loader import no_fields
from data.tags.tag_index import TagIndex
from engine.measures.probe import gather_features
from engine.measures.ridge import PENALTIES, standardise
from engine.tasks.kind import ImageTask, Setup
from models.image_model import ImageModel, find_head
from utils.contracts import Batch
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

_FOLDS = 5  # one of them chooses the penalties
_STEPS = 200


@torch.no_grad()
def fit_new_tags(task: ImageTask, data: Data, rows: np.ndarray, index: TagIndex, setup: Setup) -> None:
    """Fit the head's outputs from `known_tags` on to the tags of `rows`; all ranks get the same head.

    The penalty of each tag minimises its loss on a fifth of the images; near-duplicates are on one side.
    Raises UserError (`task.append_to`) if there are not enough images.
    """
    features, found = read_features(task, data, rows, setup)
    first = setup.facts["known_tags"]
    rows = found.numpy()
    groups = np.unique(data.collection.leads(rows)[rows], return_inverse=True)[1]
    if not groups.any():
        raise UserError(f"task.append_to: {len(rows)} images could be read to fit the new tags; give two or more")
    head = find_head(task.network)
    targets = torch.zeros(len(rows), head.out_features, dtype=torch.float64)
    for number, row in enumerate(rows.tolist()):
        targets[number, index.unknown_of(row)] = torch.nan
        targets[number, index.of_row(row)] = 1.0
    mean, scale = standardise(features)
    held_out = torch.from_numpy(groups % _FOLDS == 0)
    features = (features - mean) / scale
    weight, bias = distributed.rank_zero_call(lambda: _fit(features, targets[:, first:], held_out))
    weight = weight / scale
    head.weight[first:] = weight
    head.bias[first:] = bias - weight @ mean
    log.info("task.append_to: %d new tags, fitted to %s images", len(weight), f"{len(rows):,}")


def read_features(task: ImageTask, data: Data, rows: np.ndarray, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return the head's input, float64 [N, C], for those of `rows` whose image can be read, and these rows [N]."""
    model = ImageModel(task.network, task.normalise, "tags").to(data.machine.device).eval()

    def embed() -> Iterator[tuple[Tensor, Batch]]:
        for batch in data.prepared(rows, no_fields, setup.preprocessing):
            yield model.embed(batch["images"]), batch | {"labels": batch["sample_id"]}

    found = gather_features(embed())
    task.train()
    return found


def _fit(features: Tensor, targets: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [T, C] and bias [T] for features [N, C] and targets [N, T], NaN if unknown; held_out: bool [N]."""
    losses = []
    for penalty in PENALTIES:
        weight, bias = _solve(features[~held_out], targets[~held_out], torch.full(targets.shape[1:], penalty).double())
        scores = features[held_out] @ weight.T + bias
        losses.append(_mean_losses(scores, targets[held_out]))
    return _solve(features, targets, torch.tensor(PENALTIES).double()[torch.stack(losses).argmin(dim=0)])


def _mean_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of each tag [T] over the images [N] with a known label."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    return losses.where(known, 0.0).sum(dim=0) / known.sum(dim=0).clamp(min=1)


@torch.enable_grad()
def _solve(features: Tensor, targets: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus half the squared weights times `penalty` [T], for each tag."""
    weight = torch.zeros(targets.shape[1], features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = targets.nanmean(dim=0).nan_to_num().logit(eps=1e-6).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        losses = _mean_losses(features @ weight.T + bias, targets)
        loss = losses.sum() + (penalty * weight.square().sum(dim=1)).sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()
