"""FCMAE pretraining: reconstruct the masked patches of an image.

The loader's workers draw the mask from each sample's key, so it does not depend on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.collection.choose import choose_probe_rows, spread
from data.collection.collection import Collection
from data.open import Data
from data.stream.loader import Example, Fields
from engine.measures.means import Means
from engine.measures.probe import measure_probes
from engine.task import Loaders, Report, StepOutput, Streams
from engine.tasks.config import FCMAETaskConfig, ImageTrainingConfig
from engine.tasks.kind import ImageTask, Kind, Setup, label_fields
from models.config import ConvNeXtV2Config, ModelConfig
from models.fcmae import FCMAE, check_patch_grid, count_removed, draw_mask, repeat_sites
from utils.contracts import Batch, State
from utils.errors import UserError
from utils.io.files import Json
from utils.record import pictures
from utils.record.logging import log

# With this many images the loss is exact to a percent; a large split would take longer than an epoch of training.
VALIDATION_IMAGES = 4096
_MASK_GREY = 160
_PICTURES = 10


def _patch_px(model: ModelConfig, config: FCMAETaskConfig) -> int:
    """Return the patch size. Raises UserError if FCMAE cannot pretrain the network."""
    if not isinstance(model, ConvNeXtV2Config):
        raise UserError(f"model: FCMAE pretrains ConvNeXt V2, not {model.name}; set model=convnextv2_tiny, for example")
    return model.total_stride if config.patch_px is None else config.patch_px


def patch_count(model: ModelConfig, config: FCMAETaskConfig, image_size_hw: Sequence[int]) -> int:
    """Return the number of patches of an image.

    Raises UserError if patches, image and network do not fit, or if less than two patches would be visible: one patch
    does not predict the other patches.
    """
    height, width = image_size_hw
    patch_px = _patch_px(model, config)
    check_patch_grid(model.total_stride, (height, width), patch_px)
    count = (height // patch_px) * (width // patch_px)
    if (visible := count - count_removed(count, config.mask_ratio)) < 2:
        raise UserError(
            f"task.mask_ratio: {config.mask_ratio} of {count} patches of {patch_px} px leaves {visible} visible, but "
            f"at least 2 are needed; set a larger augment.image_size_hw (it is {height} x {width}), a lower "
            "task.mask_ratio, or a model with a smaller total stride, such as model=convnextv2_glyph"
        )
    return count


class FCMAETask(ImageTask):
    """Own the masked autoencoder. Fine-tuning uses its encoder."""

    keep_head = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.task
        self.network = FCMAE(
            encoder=self.network,
            patch_px=_patch_px(setup.model, config),
            mask_ratio=config.mask_ratio,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
        )
        self.probe_k = config.probe.k

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's mean squared error over its masked patches."""
        return StepOutput(self._reconstruct(batch)[2])

    def show_inputs(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Return images with grey masked patches."""
        images, text = super().show_inputs(batch)
        return torch.where(self._removed(images, batch["mask"])[:, None], _MASK_GREY, images.float()), text

    def _removed(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return which pixels are masked, bool [B, H, W]."""
        return repeat_sites(mask.reshape(-1, *self.network.grid_of(images.shape[-2:])), self.network.patch_px)

    def _reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised images, the predicted patches and the loss of each sample [B]."""
        images = self.normalise(batch["images"])
        pred = self.network(images, batch["mask"])
        return images, pred, self.network.loss_per_sample(images, pred, batch["mask"])

    def evaluate(self, loaders: Loaders, step: int) -> Report:
        """Return the loss over all samples of `val`, and reconstructions of the first samples.

        With labelled samples in `probe_train` and `probe_val`, also return the accuracies of probes of the encoder's
        mean features.
        """
        means = Means()
        images = {}
        for batch in loaders["val"]:
            inputs, pred, loss = self._reconstruct(batch)
            means.add({"loss": loss}, batch["weight"] > 0)
            if not images:
                images["reconstructions"] = self._draw(inputs, pred, batch)
        scalars = means.reduce()
        del scalars["samples"]
        if "probe_train" in loaders:
            encode = lambda batch: (self.network.encoder(self.normalise(batch["images"])), batch)  # noqa: E731
            probes = (map(encode, loaders[name]) for name in ("probe_train", "probe_val"))
            scalars |= measure_probes(*probes, self.probe_k)
        return Report(scalars, images=images)

    def _draw(self, images: Tensor, pred: Tensor, batch: Batch) -> np.ndarray:
        """Draw rows of originals, inputs with grey masked patches, and reconstructions, for a few images of a batch."""
        images = images[:_PICTURES]
        mask = batch["mask"][:_PICTURES]
        painted = self.network.reconstruct(images, pred[:_PICTURES].float(), mask)
        original, painted = (self.normalise.undo(row).permute(0, 2, 3, 1) for row in (images, painted))
        masked = torch.where(self._removed(images, mask)[..., None], _MASK_GREY, original)
        images = torch.cat([original, masked, painted]).cpu().numpy()
        title = "From the top: originals, masked inputs, reconstructions"
        return pictures.image_grid(images, [()] * len(images), title, columns=len(mask))


class FCMAEKind(Kind):
    """Pretraining on all images of the training split. The encoder outputs features.

    Labels probe the encoder, and never train it.
    """

    task = FCMAETask
    output = "features"
    network = "network.encoder"
    next_commands = ("python finetune.py init_from={run} {data}",)

    def preprocessing(self, config: ImageTrainingConfig) -> Json:
        """Return how evaluation prepares an image. Raises UserError unless patches, images and network fit."""
        patch_count(config.model, config.task, config.augment.image_size_hw)
        return super().preprocessing(config)

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return all rows, and a function that adds a sample's mask, bool [L], True for removed patches."""
        patches = patch_count(setup.model, setup.task, setup.preprocessing["image_size_hw"])

        def mask(example: Example) -> State:
            return {"mask": draw_mask(example.generator, patches, setup.task.mask_ratio)}

        return super().samples(collection, setup)[0], mask

    def streams(self, data: Data, setup: Setup, config: ImageTrainingConfig) -> Streams:
        """Return the data of a run. The probe runs every `task.probe.every_epochs`."""
        streams = super().streams(data, setup, config)
        probes = {name: setup.task.probe.every_epochs for name in streams.evaluation if name.startswith("probe_")}
        return replace(streams, every_epochs=probes)

    def evaluation(self, data: Data, setup: Setup, rows: np.ndarray, *, training: bool) -> Loaders:
        """Return `val`, in a run with at most VALIDATION_IMAGES images, and the probe's loaders."""
        rows = spread(rows, VALIDATION_IMAGES) if training else rows
        loaders = {"val": data.prepared(rows, self.samples(data.collection, setup)[1], setup.preprocessing)}
        if training and setup.task.probe.every_epochs is None:
            return loaders
        collection = data.collection
        probe = setup.task.probe
        class_ids = collection.class_ids(collection.class_names("train"))
        train, val = choose_probe_rows(class_ids, collection.rows("train"), collection.rows("val"), probe.images)
        if len(np.unique(class_ids[train])) < 2 or len(val) == 0:
            log.info("probe: off, because fewer than two classes have images; task.probe.every_epochs=null is silent")
            return loaders
        fields = label_fields(labels=class_ids)
        loaders["probe_train"] = data.prepared(train, fields, setup.preprocessing)
        loaders["probe_val"] = data.prepared(val, fields, setup.preprocessing)
        return loaders
