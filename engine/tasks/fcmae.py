"""FCMAE pretraining: reconstruct the masked patches of an image.

The loader's workers draw the mask from each sample's key, so it is the same on any number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from data.collection import Collection
from data.config import AugmentConfig
from data.device_augment import IMAGES
from data.loader import Example, Fields
from data.open import Data
from data.rows import choose_probe_rows, spread
from data.transforms import FOOTPRINT, ByGroup, Footprint, Views, evaluation_views
from engine.measures.drawings import draw_reconstructions
from engine.measures.means import Means
from engine.measures.probe import Features, measure_probes
from engine.streams import Streams
from engine.task import Exported, Report, StepOutput, Task
from engine.tasks.image_pipeline import ImagePipeline, ImageTrainingConfig, augments
from engine.tasks.kind import Kind, Setup, TaskConfig
from engine.tasks.labels import LabelFields
from models.build import build_network
from models.config import ConvNeXtV2Config, ModelConfig
from models.convnextv2 import repeat_sites
from models.fcmae import FCMAE, check_patch_grid, count_removed, draw_mask
from models.weights.initialise import initialise_from
from utils.config.bounds import Count, Depth, Duration, Side, Width
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.weights import InitFrom
from utils.record.logging import get_logger

log = get_logger(__name__)

# The loss of this number of images is exact to a percent; a large split would take longer than an epoch of training.
VALIDATION_IMAGES = 4096
_MASK_GREY = 160
_PICTURES = 10


class ProbeConfig(Strict):
    """When frozen features are probed (null: never in training), on how many images at most, with k neighbours."""

    every_epochs: Duration | None
    train_images: Count
    val_images: Count
    k: Count


class FCMAETaskConfig(TaskConfig):
    """Pretraining by reconstruction of masked patches. `patch_px` null means the network's total stride.

    `ignore_padding`: what `augment.pad` adds is not in the loss.
    """

    name: Literal["fcmae"]
    mask_ratio: Annotated[float, Field(ge=1e-6, lt=1)]
    patch_px: Side | None
    decoder_dim: Width
    decoder_depth: Depth  # without a block, nothing of the image would reach a masked site
    norm_pix_loss: bool
    ignore_padding: bool
    execution: Literal["sparse", "dense"]
    probe: ProbeConfig

    def check_run(self, config: ImageTrainingConfig) -> None:
        """Raise ValueError where there is no padding to ignore, or the workers do not know where it will be."""
        augment = config.augment
        if self.ignore_padding and (augment.pad == "none" or augment.on_device or augment.rand_augment is not None):
            raise ValueError(
                "task.ignore_padding: true needs augment.pad=square or buckets, and augment.on_device=false and "
                "augment.rand_augment=null, which leave the padding where it is known; set them, or "
                "task.ignore_padding=false"
            )


class MaskFields:
    """Add a sample's mask, bool [L], True where a patch of its image is removed."""

    def __init__(self, patch_px: int, mask_ratio: float) -> None:
        self.patch_px, self.mask_ratio = patch_px, mask_ratio

    def __call__(self, example: Example) -> dict[str, Tensor]:
        """Return the mask."""
        height, width = example.views[IMAGES].shape[-2:]
        patches = (height // self.patch_px) * (width // self.patch_px)
        return {"mask": draw_mask(example.generator, patches, self.mask_ratio)}


def _patch_px(model: ModelConfig, config: FCMAETaskConfig) -> int:
    """Return the patch size, after checking that the network can be pretrained this way."""
    if not isinstance(model, ConvNeXtV2Config):
        raise UserError(f"model: FCMAE pretrains ConvNeXt V2, not {model.name}; set model=convnextv2_tiny, say")
    return model.total_stride if config.patch_px is None else config.patch_px


def patch_count(model: ModelConfig, config: FCMAETaskConfig, image_size_hw: Sequence[int]) -> int:
    """Return the number of patches of an image.

    Raises UserError where patches, image and network do not fit, and where a single patch would be visible: nothing of
    the others can be told from it.
    """
    height, width = image_size_hw
    patch_px = _patch_px(model, config)
    check_patch_grid(model.total_stride, (height, width), patch_px)
    count = (height // patch_px) * (width // patch_px)
    if count - count_removed(count, config.mask_ratio) < 2:
        raise UserError(
            f"task.mask_ratio: {config.mask_ratio} of {count} patches of {patch_px} px leaves one visible, of which "
            f"nothing can be learned; set a larger augment.image_size_hw (it is {height} x {width}), a lower "
            "task.mask_ratio, or a model of a smaller total stride, such as model=convnextv2_glyph"
        )
    return count


def _footprint(batch: Batch) -> Tensor | None:
    """Return the weight of each pixel, float [B, 1, H, W], 0 for padding; None where all count."""
    return batch[FOOTPRINT] / 255 if FOOTPRINT in batch else None


class FCMAETask(Task):
    """Own the masked autoencoder; fine-tuning takes the encoder in it."""

    def __init__(self, setup: Setup[FCMAETaskConfig]) -> None:
        super().__init__()
        config = setup.task
        self.network = FCMAE(
            encoder=build_network(setup.model, num_classes=0),
            patch_px=_patch_px(setup.model, config),
            mask_ratio=config.mask_ratio,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
            norm_pix_loss=config.norm_pix_loss,
            execution=config.execution,
        )
        self.normalise = setup.normalise()
        self.probe_k = config.probe.k
        self._metadata = setup.metadata()

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; of an encoder alone, the decoder stays as it was drawn."""
        self.origin = initialise_from(self.network, source, keep_head=True)

    def exported(self) -> Exported:
        """Return encoder and decoder, and the preprocessing."""
        return Exported(metadata=self._metadata)

    def forward(self, batch: Batch, progress: Tensor) -> StepOutput:
        """Return each sample's mean squared error over its masked patches."""
        return StepOutput(self._reconstruct(batch)[2])

    def _reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised images, the predicted patches and the loss per sample [B]."""
        images = self.normalise(batch["images"])
        pred = self.network(images, batch["mask"])
        return images, pred, self.network.loss_per_sample(images, pred, batch["mask"], _footprint(batch))

    def evaluate(self, loaders: Mapping[str, Iterable[Batch]], step: int) -> Report:
        """Return the loss over all samples of `val`, and reconstructions of the first ones.

        With labelled samples in `probe_train` and `probe_val`, also the accuracies of probes of the encoder.
        """
        means, images = Means(), {}
        for batch in loaders["val"]:
            inputs, pred, loss = self._reconstruct(batch)
            means.add({"loss": loss}, batch["weight"] > 0)
            if not images:
                images["reconstructions"] = self._draw(inputs, pred, batch)
        scalars = means.reduce()
        if "probe_train" in loaders:
            scalars |= self._probe(loaders)
        return Report({name: value for name, value in scalars.items() if name != "samples"}, images=images)

    def _probe(self, loaders: Mapping[str, Iterable[Batch]]) -> dict[str, float]:
        """Return the accuracies of probes of the encoder's mean features."""
        train, val = Features(), Features()
        for features, loader in ((train, loaders["probe_train"]), (val, loaders["probe_val"])):
            for batch in loader:
                encoded = self.network.encoder(self.normalise(batch["images"]))
                features.add(encoded, batch["labels"], batch["sample_id"], batch["weight"])
        return measure_probes(train, val, self.probe_k)

    def _draw(self, images: Tensor, pred: Tensor, batch: Batch) -> np.ndarray:
        """Return rows of originals, inputs with the masked patches grey, and reconstructions of some of a batch."""
        few = torch.linspace(0, len(images) - 1, min(_PICTURES, len(images)), device=images.device).round().long()
        images, pred, mask, footprint = images[few], pred[few].float(), batch["mask"][few], _footprint(batch)
        painted = self.network.reconstruct(images, pred, mask, None if footprint is None else footprint[few])
        grid_hw = self.network.grid_of(images.shape[-2:])
        removed = repeat_sites(mask.reshape(-1, *grid_hw), self.network.patch_px)
        original, painted = (self.normalise.undo(row).permute(0, 2, 3, 1) for row in (images, painted))
        masked = torch.where(removed[..., None], _MASK_GREY, original)
        return draw_reconstructions(*(row.cpu().numpy() for row in (original, masked, painted)))


class FCMAEPipeline(ImagePipeline[FCMAETaskConfig]):
    """All images of the training split, labelled or not. Labels are used to probe the encoder, never to train it."""

    def unit_px(self, config: ImageTrainingConfig) -> int:
        """Return the side of a patch."""
        return _patch_px(config.model, config.task)

    def fields(self, collection: Collection, setup: Setup[FCMAETaskConfig]) -> Fields:
        """Return what adds the mask."""
        stated = setup.preprocessing
        for size_hw in (stated["image_size_hw"], *(stated.get("buckets_hw") or ())):
            patch_count(setup.model, setup.task, size_hw)
        return MaskFields(_patch_px(setup.model, setup.task), setup.task.mask_ratio)

    def views(self, setup: Setup[FCMAETaskConfig], augment: AugmentConfig) -> Views:
        """Return the training image and, where padding is ignored, its footprint."""

        views = super().views(setup, augment)
        if not setup.task.ignore_padding:
            return views
        footprints = ByGroup.views(augments(augment, setup), lambda own: {FOOTPRINT: Footprint.of_training(own)})
        return {**views, **footprints}

    def streams(self, data: Data, setup: Setup[FCMAETaskConfig], config: ImageTrainingConfig) -> Streams:
        """Return the data of a run; the probe's loaders are used every `task.probe.every_epochs`."""
        streams, every = super().streams(data, setup, config), setup.task.probe.every_epochs
        probes = {name: every for name in streams.evaluation if name.startswith("probe_")}
        return replace(streams, every_epochs=probes)

    def evaluation(self, data: Data, setup: Setup[FCMAETaskConfig], *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return `val`, of at most VALIDATION_IMAGES images within a run, and the probe's loaders."""
        rows = data.collection.rows("val")
        rows = spread(rows, VALIDATION_IMAGES) if training else rows

        def make(stated: Mapping[str, Any]) -> Views:
            footprint = {FOOTPRINT: Footprint.of_evaluation(stated)} if setup.task.ignore_padding else {}
            return {**evaluation_views(stated), **footprint}

        loaders = {"val": data.prepared(rows, self.fields(data.collection, setup), setup.preprocessing, make)}
        if training and setup.task.probe.every_epochs is None:
            return loaders
        return loaders | self._probe_loaders(data, setup)

    def _probe_loaders(self, data: Data, setup: Setup[FCMAETaskConfig]) -> dict[str, Iterable[Batch]]:
        """Return `probe_train` and `probe_val`; nothing, and a line in the log, where there are too few labels."""
        collection, probe = data.collection, setup.task.probe
        class_ids = collection.class_ids(collection.class_names("train"))
        train, val = choose_probe_rows(
            class_ids, collection.rows("train"), collection.rows("val"), probe.train_images, probe.val_images
        )
        classes = len(np.unique(class_ids[train]))
        if classes < 2 or len(val) == 0:
            log.info(
                "probe: off, because the collection gives it %s labelled training images of %d classes and %s "
                "validation images of them; task.probe.every_epochs=null silences this line",
                f"{len(train):,}", classes, f"{len(val):,}",
            )  # fmt: skip
            return {}
        log.info(
            "probe: %s training and %s validation images of %d classes", f"{len(train):,}", f"{len(val):,}", classes
        )
        return {
            name: data.prepared(rows, LabelFields(class_ids), setup.preprocessing)
            for name, rows in (("probe_train", train), ("probe_val", val))
        }


class FCMAEKind(Kind[FCMAETaskConfig]):
    """Pretraining without labels; its encoder gives features."""

    config = FCMAETaskConfig
    pipeline = FCMAEPipeline()
    scripts = ("pretrain_fcmae",)
    output = "features"
    next_commands = ("python finetune.py init_from={run} {data}", *Kind.next_commands)

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return nothing, after checking that patches, image and network fit."""
        patch_count(config.model, config.task, config.augment.image_size_hw)
        return {}

    def build(self, setup: Setup[FCMAETaskConfig]) -> FCMAETask:
        """Return the task."""
        return FCMAETask(setup)

    def image_network(self, task: FCMAETask) -> nn.Module:
        """Return the encoder."""
        return task.network.encoder
