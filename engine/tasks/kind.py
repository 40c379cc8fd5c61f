"""What a kind of training is: its config, what it knows of the collection, how data reach its task, what comes of it.

    collection = load_collection(config.data)
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    streams = kind.streams(Data(collection, source, runtime, ...), setup, config)
    task = kind.build(setup)

A kind's config, task and Kind are in one file; kinds.py has an entry for each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError, model_validator
from torch import Tensor

from data.augment.on_device import IMAGES, training_views
from data.augment.transforms import ByGroup, TrainTransform
from data.collection.collection import Collection
from data.collection.rows import training_rows
from data.config import AugmentConfig, DataConfig
from data.latents.buckets import letterbox_groups, letterbox_sizes
from data.open import Data, describe_collection, open_images
from data.stream.loader import Fields, no_fields
from data.stream.order import GroupedSampler, Sampler, Views, build_sampler
from data.stream.source import Source
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.task import Streams, Task, split_exported
from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.normalise import Normalise
from models.predictor import check_metadata, wrong_metadata
from models.weights.fit import refuse_misfits
from models.weights.initialise import initialise_from
from utils.canvas import DEFAULT, background_of
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError, close_names
from utils.io.files import canonical_json, sha256_text
from utils.io.weights import InitFrom
from utils.record.logging import get_logger
from utils.vocabulary import FACTS, read_facts

log = get_logger(__name__)

_CHUNK = 128  # neighbouring samples of one bucket at most, and so the largest micro-batch
_STRIDE_PX = 32  # total, of nearly all of timm's networks


class TaskConfig(Strict):
    """The base of all `task` groups; `name` is the kind's name in the table."""

    name: str

    def check_run(self, config: "ImageTrainingConfig") -> None:
        """Raise ValueError where other keys of the run do not suit the task; the message begins with the key."""


@dataclass(frozen=True)
class Setup:
    """What a task is built from: by a run's configuration and collection, or by a weight file's metadata alone.

    preprocessing: what evaluation does to an image (AugmentConfig.preprocessing); empty for kinds without images.
    facts: what the task knows of the collection it was trained on, such as class names (JSON values).
    """

    model: Any
    task: Any
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def normalise(self) -> Normalise:
        """Return the normalisation of images."""
        return Normalise(self.preprocessing["mean"], self.preprocessing["std"], self.model.in_channels)

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each fact: a resumed run must know the same, in the same order."""
        return {f"facts.{name}": sha256_text(canonical_json(value))[:16] for name, value in self.facts.items()}


class ImageTrainingConfig(TrainingConfig):
    """The schema of a training script on images; the script says which tasks it trains."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    task: TaskConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.augment.pad == "buckets" and (self.augment.on_device or self.loop.sampling != "shuffled"):
            raise ValueError(
                f"augment.pad: buckets needs augment.on_device=false (it is {str(self.augment.on_device).lower()}) and "
                f"loop.sampling=shuffled (it is {self.loop.sampling}); set them, or augment.pad=square"
            )
        self.task.check_run(self)
        return self


class ImageTask(Task):
    """A task with one network on images, whose head has so many outputs (0: no head)."""

    def __init__(self, setup: Setup, outputs: int = 0) -> None:
        super().__init__()
        check_image_size(setup.model, tuple(setup.preprocessing["image_size_hw"]))
        self.network = build_network(setup.model, num_classes=outputs)
        self.normalise = setup.normalise()

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; the head stays as it was drawn."""
        self.origin = initialise_from(self.network, source, keep_head=False)


class Kind:
    """One kind of training on the images of a collection. Subclasses state what differs.

    config: the schema of its `task` group; model: of its `model` group. task: is built from a Setup. scripts: the root
    scripts that train it. names: the facts that its weight files state; the others are for training alone.
    output: what the network named `network` makes of one image, a name in models/outputs.py; None where it makes
    nothing of an image alone. next_commands: what can be typed after a run, with {run} for its folder and {data} for
    its collection.
    """

    config: ClassVar[type[TaskConfig]]
    model: ClassVar[Any] = ModelConfig
    task: ClassVar[type[Task]] = ImageTask
    scripts: ClassVar[tuple[str, ...]] = ("train", "finetune")
    names: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str | None] = None
    network: ClassVar[str] = "network"
    next_commands: ClassVar[tuple[str, ...]] = ("python evaluate.py run_dir={run}",)

    # --------------------------------------------------------------------------------------------------------- setup

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return what the task must know of the collection. Raises UserError where the collection does not suit it."""
        return {}

    def preprocessing(self, config: ImageTrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to an image; of buckets, to one in a square, and their sizes (`buckets_hw`)."""
        augment, background = config.augment, config.data.background
        stated = augment.preprocessing(config.model.in_channels)
        stated["background"] = DEFAULT if background is None else background
        if config.data.icc:
            stated["icc"] = True
        if augment.pad == "buckets":
            unit_px = getattr(config.task, "patch_px", None) or getattr(config.model, "total_stride", _STRIDE_PX)
            stated["buckets_hw"] = letterbox_sizes(augment.image_size_hw, unit_px).tolist()
        return stated

    def set_up(self, config: ImageTrainingConfig, collection: Collection) -> Setup:
        """Return what the task of a new run is built from."""
        facts = self.find_facts(config, collection)
        return Setup(config.model, config.task, self.preprocessing(config), facts)

    def build(self, setup: Setup) -> Task:
        """Return the task with drawn weights."""
        task = self.task(setup)
        stated = {name: setup.facts[name] for name in self.names}
        if setup.preprocessing:
            stated["preprocessing"] = dict(setup.preprocessing)
        task.metadata = {**stated, **task.metadata}
        return task

    def source(self, collection: Collection, config: DataConfig, setup: Setup, *, repeats: bool) -> Source:
        """Return the images on the background and in the colours that the network was trained on."""
        stated = setup.preprocessing
        background = background_of(stated) if config.background is None else config.background
        config = config.model_copy(update={"icc": config.icc or stated.get("icc", False)})
        return open_images(
            collection, config, stated["channels"], background, shortest_px=stated.get("shortest_px"), repeats=repeats
        )

    # ----------------------------------------------------------------------------------------------------- samples

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return which rows the task can use, bool [N], and what a sample has beside its images."""
        return np.ones(len(collection), dtype=bool), no_fields

    def views(self, setup: Setup, augment: AugmentConfig) -> Views:
        """Return the named views of a training image; a kind with its own makes them in the workers."""
        background, sizes_hw = setup.preprocessing["background"], setup.preprocessing.get("buckets_hw")
        if sizes_hw is None:
            return training_views(augment, background)
        each = [augment.model_copy(update={"image_size_hw": size_hw}) for size_hw in sizes_hw]
        return {IMAGES: ByGroup([TrainTransform(own, background) for own in each])}

    def sampler(self, collection: Collection, setup: Setup, config: ImageTrainingConfig, rows: np.ndarray) -> Sampler:
        """Return the order of the training rows: the one that `loop.sampling` names.

        Of buckets, in chunks that divide the global batch. Raises UserError (`augment.image_size_hw`) where the network
        does not take images of all their sizes.
        """
        groups = letterbox_groups(collection, rows, setup.preprocessing)
        if groups is None:
            return build_sampler(config.loop.sampling, rows, collection, config.seed)
        sizes_hw, batch = setup.preprocessing["buckets_hw"], config.loop.global_batch_size
        counted = zip(np.bincount(groups).tolist(), sizes_hw)
        found = [f"{count:,} of {height} x {width}" for count, (height, width) in counted if count]
        log.info("augment.pad=buckets: %s px", ", ".join(found))
        for height, width in sizes_hw:
            check_image_size(setup.model, (height, width))
        return GroupedSampler(rows, groups, max(n for n in range(1, _CHUNK + 1) if batch % n == 0), config.seed)

    # ----------------------------------------------------------------------------------------------------- streams

    def streams(self, data: Data, setup: Setup, config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        collection, views = data.collection, self.views(setup, config.augment)
        is_usable, fields = self.samples(collection, setup)
        rows = training_rows(collection, config.loop.train_paths)
        rows = rows[is_usable[rows]]
        train = data.train(rows, fields, views, sampler=self.sampler(collection, setup, config, rows))
        described = {
            "collection": describe_collection(collection),
            "images": config.augment.describe("orientation" in setup.facts),
        }
        fingerprints = {**data.fingerprints, **setup.fingerprints()}
        return Streams(train, self.evaluation(data, setup, training=True), fingerprints, described=described)

    def evaluation(self, data: Data, setup: Setup, *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the images of `val` that the task can use."""
        (is_usable, fields), rows = self.samples(data.collection, setup), data.collection.rows("val")
        return {"val": data.prepared(rows[is_usable[rows]], fields, setup.preprocessing)}

    def prepare(self, task: Task, data: Data, setup: Setup, config: ImageTrainingConfig, runtime: Runtime) -> None:
        """Change the initial weights by looking at the data, on a new run only."""


def check_weights(
    path: Path, shapes: Mapping[str, Tensor], metadata: dict[str, Any], kinds: Mapping[str, Kind]
) -> tuple[Kind, Setup]:
    """Return a weight file's kind, one of `kinds`, and setup, for the price of its header.

    shapes: its tensors on the meta device. Raises UserError that names the first wrong value of the metadata,
    which may be a stranger's, and where metadata and tensors do not fit together.
    """
    if "model" not in metadata or not isinstance(metadata.get("task"), dict):
        raise UserError(
            f"{path} is no file of a run of Atelier, or of a backbone, which is for init_from. Other weights "
            f"become a run by: python finetune.py init_from={path} task.head=kept loop.total_steps=0 model=... "
            "augment=... data=... run_dir=... (docs/weights.md)"
        )
    name = metadata["task"].get("name")
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"{path} is of an unknown task {name!r}; {close_names(str(name), kinds)}")
    kind = kinds[name]
    if kind.output is not None:
        check_metadata(path, {**metadata, "output": kind.output})
    if kind.names == FACTS:
        read_facts(path, metadata)
    try:
        model = TypeAdapter(kind.model).validate_python(metadata["model"])
        task = kind.config.model_validate(metadata["task"])
    except ValidationError as error:
        raise wrong_metadata(path, error) from None
    setup = Setup(model, task, metadata.get("preprocessing", {}), {name: metadata[name] for name in kind.names})
    with torch.device("meta"):
        built = kind.build(setup)
    wanted, _ = split_exported(built, built.state_dict())
    refuse_misfits(shapes, wanted, str(path), "Export or train the file again.")
    return kind, setup
