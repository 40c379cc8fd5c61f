"""The weights of tags by how often training has shown each: `task.tag_weights.reestimate_steps`.

    weights = balance(batch)     # of the samples, in the forward pass; their tags are counted
    balance.after_step(step)     # weighs anew when that is due

What is counted is what the network was told: neither dropped tags and captions, nor unreadable images, nor skipped
steps. Counts are integers, so their sum over ranks is exact; they and the weights in force are checkpointed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.tag_weights import TagWeightsConfig
from utils.contracts import Batch
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)


class TagBalance(nn.Module):
    """Weights [T] float32 and counts [T] int64. facts: of data/tag_weights.py; the first weights are by its counts."""

    def __init__(self, config: TagWeightsConfig, facts: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        self._config = config
        self._factors, self._shares = np.array(facts["factors"]), np.array(facts["shares"])
        self.register_buffer("weights", self._weigh(np.array(facts["counts"])))
        self.register_buffer("shown", torch.zeros(len(self._factors), dtype=torch.int64))
        self.register_buffer("pending", torch.zeros_like(self.shown))  # of this step and rank

    @torch.compiler.disable  # the number of tags of a batch is not one to compile for
    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Return the mean weight of each sample's tags, float32 [B], 1 where it has none; count the tags shown."""
        tags, offsets = batch["tags"], batch["tags_offsets"]
        # From 1; 0 and B + 1 own the tags of other parts of a batch that was cut (data/batch.py).
        owners = torch.bucketize(torch.arange(len(tags), device=tags.device), offsets, right=True)
        shown = batch["tags_shown"] & F.pad(batch["weight"] > 0, (1, 1))[owners]
        self.pending.index_add_(0, tags, shown.long())
        weights, zeros = self.weights[tags], torch.zeros(len(offsets) + 1, device=tags.device)
        sums, sizes = zeros.index_add(0, owners, weights), zeros.index_add(0, owners, (weights > 0).float())
        return torch.where(sizes > 0, sums / sizes.clamp_min(1), 1.0)[1:-1]

    def after_step(self, step: int) -> None:
        """Add the step's counts; every `reestimate_steps` weigh anew, which waits for the device."""
        self.shown += distributed.all_reduce_sum(self.pending)
        self.pending.zero_()
        if (step + 1) % self._config.reestimate_steps == 0:
            self.weights.copy_(self._weigh(self.shown.cpu().numpy()))
            low, high = self.weights.min(), self.weights.max()
            log.info("step %d: tags weigh %.2f to %.2f, by %s shown", step + 1, low, high, f"{self.shown.sum():,}")

    def _weigh(self, counts: np.ndarray) -> Tensor:
        """Return the weights by counts [T]: of 1 on average over the images of the collection, as `shares` has them."""
        weights = self._config.weigh(counts, self._factors)
        mean = weights @ self._shares
        return torch.from_numpy((weights / (mean or 1.0)).astype(np.float32))
