"""FCMAE pretraining: reconstruct the masked patches of an image.

The mask is drawn by the loader's workers from each sample's key, so it is the same on any number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.task import Batch, Knobs, Report, StepOutput, Task, mean_over_readable
from engine.tasks.config import FCMAETaskConfig
from engine.tasks.probe import measure_features
from models.build import build_network
from models.config import ConvNeXtV2Config, ModelConfig
from models.convnextv2 import repeat_sites
from models.fcmae import FCMAE, check_patch_grid, count_removed, draw_mask
from models.normalise import Normalise
from utils.errors import UserError
from utils.ranks import distributed
from utils.record import pictures

_MASK_GREY = 160


class MaskFields:
    """Draw a sample's mask: what the loader adds to each sample, [L] bool, True where a patch is removed."""

    def __init__(self, num_patches: int, mask_ratio: float) -> None:
        count_removed(num_patches, mask_ratio)  # refuses a ratio that leaves nothing to see or to guess
        self.num_patches, self.mask_ratio = num_patches, mask_ratio

    def __call__(self, index: int, row: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the mask."""
        return {"mask": draw_mask(generator, self.num_patches, self.mask_ratio)}


def _patch_px(model: ModelConfig, config: FCMAETaskConfig) -> int:
    """Return the patch size, after checking that the network can be pretrained this way."""
    if not isinstance(model, ConvNeXtV2Config):
        raise UserError(f"model: FCMAE pretrains ConvNeXt V2, not {model.name}; set model=convnextv2_tiny, say")
    return model.total_stride if config.patch_px is None else config.patch_px


def patch_count(model: ModelConfig, config: FCMAETaskConfig, image_size_hw: Sequence[int]) -> int:
    """Return the number of patches of an image. Raises UserError where patches, image and network do not fit."""
    height, width = image_size_hw
    patch_px = _patch_px(model, config)
    check_patch_grid(model.total_stride, (height, width), patch_px)
    return (height // patch_px) * (width // patch_px)


class FCMAETask(Task):
    """Own the masked autoencoder; the encoder in it is what fine-tuning takes on."""

    best_metric: ClassVar[str] = "loss"
    pictures = 10

    def __init__(
        self,
        model: ModelConfig,
        config: FCMAETaskConfig,
        *,
        image_size_hw: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        height, width = image_size_hw
        patch_px = _patch_px(model, config)
        self.network = FCMAE(
            encoder=build_network(model, num_classes=0),
            image_size_hw=(height, width),
            patch_px=patch_px,
            mask_ratio=config.mask_ratio,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
            norm_pix_loss=config.norm_pix_loss,
            execution=config.execution,
            grn_over=config.grn_over,
        )
        self.normalise = Normalise(mean, std, model.in_channels)
        self.probe = config.probe
        self._preprocessing = {"image_size_hw": [height, width], "mean": list(mean), "std": list(std)}

    def forward(self, batch: Batch, knobs: Knobs) -> StepOutput:
        """Return each sample's mean squared error over its masked patches."""
        images = self.normalise(batch["images"])
        pred = self.network(images, batch["mask"])
        return StepOutput(self.network.loss_per_sample(images, pred, batch["mask"]))

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Return the loss over all samples of `val`, and reconstructions of the first ones.

        With `probe_train` and `probe_val`, whose samples carry labels, also what a probe of the encoder recognises.
        """
        total = torch.zeros(2, dtype=torch.float64)
        picture: np.ndarray | None = None
        for batch in loaders["val"]:
            images = self.normalise(batch["images"])
            pred = self.network(images, batch["mask"])
            loss = self.network.loss_per_sample(images, pred, batch["mask"])
            valid = batch["weight"] > 0
            total += torch.stack([torch.where(valid, loss, 0.0).double().sum(), valid.double().sum()]).cpu()
            if picture is None:
                picture = self._picture(images, pred, batch["mask"])
        total = distributed.all_reduce_sum(total.to(self.normalise.mean.device)).tolist()
        scalars = {"loss": mean_over_readable(*total)}
        if "probe_train" in loaders:
            scalars |= measure_features(self._encode, loaders["probe_train"], loaders["probe_val"], k=self.probe.k)
        return Report(scalars, images={"reconstructions": picture})

    def _encode(self, images: Tensor) -> Tensor:
        """Return the features [B, C] of whole images: the encoder's mean over sites."""
        return self.network.encoder(self.normalise(images))

    def _picture(self, images: Tensor, pred: Tensor, mask: Tensor) -> np.ndarray:
        """Return rows of originals, inputs with the masked patches grey, and reconstructions of some of a batch."""
        few = torch.linspace(0, len(images) - 1, min(self.pictures, len(images)), device=images.device).round().long()
        images, pred, mask = images[few], pred[few].float(), mask[few]
        _, painted = self.network.reconstruct(images, pred, mask)
        removed = repeat_sites(mask.reshape(-1, *self.network.grid_hw), self.network.patch_px)
        original, painted = (self.normalise.undo(row).permute(0, 2, 3, 1) for row in (images, painted))
        seen = torch.where(removed[..., None], _MASK_GREY, original)
        rows = [row.cpu().numpy() for row in (original, seen, painted)]
        return pictures.image_rows(rows, ["original", "masked input", "reconstruction"])

    def metadata(self) -> dict[str, Any]:
        """Return the preprocessing."""
        return {"preprocessing": self._preprocessing}
