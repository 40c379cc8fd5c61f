"""New tags on a frozen tagger (`task.append_to`). A logistic regression for each becomes a row of the head.

Nothing else of the network changes.
"""

import numpy as np
import torch
from torch import Tensor

from data.open import Data
from data.stream.loader import no_fields
from data.tags.tag_index import TagIndex
from engine.measures.probe import gather_features
from engine.tasks.kind import ImageTask, Setup
from models.image_model import ImageModel, find_head
from optim.linear import fit_logits
from optim.ridge import standardise
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)


@torch.no_grad()
def fit_new_tags(task: ImageTask, data: Data, rows: np.ndarray, index: TagIndex, setup: Setup) -> None:
    """Fit the head's outputs from `known_tags` on to the tags of `rows`; all ranks get the same head.

    Raises UserError (`task.append_to`) if there are not enough images.
    """
    features, found = embed_rows(task, data, rows, setup)
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


def embed_rows(task: ImageTask, data: Data, rows: np.ndarray, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return the head's input, float64 [N, C], for those of `rows` whose image can be read, and these rows [N]."""
    model = ImageModel(task.network, task.normalise, "tags").to(data.machine.device).eval()
    found = gather_features(
        (model.embed(batch["images"]), batch | {"labels": batch["sample_id"]})
        for batch in data.prepared(rows, no_fields, setup.preprocessing)
    )
    task.train()
    return found
