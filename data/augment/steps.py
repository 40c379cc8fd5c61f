"""The augmentation of training: one list of its steps in their order, which workers, device and first screen read.

To add a step, add an entry to `STEPS`, a key to data/augment/config.py, and a value to conf/augment/.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from data.augment.config import AugmentConfig
from data.augment.transforms import (
    Mirror,
    NoiseErasing,
    PolicyAugment,
    ResizedCrop,
    on_pillow,
    random_affine,
)
from data.images.prepare import letterbox, prepare
from data.images.resize import on_pixels
from data.stream.order import Draw, Views
from utils import rng
from utils.contracts import Batch
from utils.formats.background import DEFAULT
from utils.formats.preprocessing import Preprocessing
from utils.io.files import Values
from utils.start import open_name

IMAGES = "images"
AUGMENT = "augment"
CROP = "crop_scale"
_DEVICE = "data.augment.on_device"
MIRROR = "horizontal_flip"


class Step(NamedTuple):
    """A step of augmentation.

    key: of `augment`; null or 0 turns the step off. says: words for the first screen, a format of the configuration.
    worker: makes the transform of an image, uint8 [C, H, W]. device: the name of the step of a batch, for
    `augment.on_device=true`; None: the device cannot, so the worker always makes the step.
    """

    key: str
    says: str
    worker: Callable[[AugmentConfig], Callable[[Tensor], Tensor]]
    device: str | None = None


# Source: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719); random erasing, Zhong et al. 2017 (arXiv 1708.04896).
STEPS = (
    # Before the resize: after it, training images would be blurred and validation images not.
    Step("affine", "affine", random_affine, f"{_DEVICE}:DeviceAffine"),
    Step(CROP, "crops of {0.crop_scale[0]:.0%} to {0.crop_scale[1]:.0%}", ResizedCrop),
    Step(MIRROR, "mirror", Mirror, f"{_DEVICE}:DeviceMirror"),
    Step(
        "color_jitter",
        "colours",
        lambda config: v2.ColorJitter(*[config.color_jitter.strength] * 3, config.color_jitter.hue),
        f"{_DEVICE}:DeviceColours",
    ),
    Step("rand_augment", "{0.rand_augment}", lambda config: on_pillow(PolicyAugment(config))),
    Step("random_erasing", "erasing", NoiseErasing, f"{_DEVICE}:DeviceErasing"),
)


def describe_augmentation(config: AugmentConfig, *, task_mirrors: bool) -> str:
    """Describe image size and augmentation in one line; task_mirrors: whether the task flips images."""
    height, width = config.image_size_hw
    stated = config.model_copy(update={MIRROR: 1.0}) if task_mirrors else config
    words = [step.says.format(stated) for step in steps_of(stated)]
    return f"{height} x {width} px, pad={config.pad}; {', '.join(words)}"


def steps_of(config: AugmentConfig) -> list[Step]:
    """Return the steps that are on."""
    return [step for step in STEPS if getattr(config, step.key)]


class TrainTransform:
    """The view `images`: padding (`augment.pad`), and the steps that a worker makes.

    background: the colour of the padding. steps: by key.
    """

    def __init__(self, config: AugmentConfig, background: Any = DEFAULT) -> None:
        stated = {**config.preprocessing(len(config.mean)), "background": background}
        self._stated = Preprocessing.model_validate(stated)
        steps = [step for step in steps_of(config) if not (config.on_device and step.device)]
        self.steps = {step.key: step.worker(config) for step in steps}

    @property
    def only_cuts(self) -> bool:
        """Whether nothing but crop and flip changes an image."""
        return self._stated.pad == "none" and self.steps.keys() <= {CROP, MIRROR}

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        """Return the transformed image."""
        image = on_pixels(image, letterbox, self._stated)
        for step in self.steps.values():  # plain calls: v2.Compose looks for images in nested inputs at each step
            image = step(image)
        return image


class DeviceAugment:
    """The view `augment`, the parameters of a sample's steps on the device, and the hook that makes these steps."""

    def __init__(self, config: AugmentConfig) -> None:
        self.steps = [open_name(step.device)(config) for step in steps_of(config) if step.device]

    def draw(self, rows: list[int], keys: list[int]) -> Tensor:
        """Return the parameters of samples, float32 [B, P]."""
        drawn = [sum((step.draw() for step in self.steps), []) for _ in rng.seeded_each(keys)]
        return torch.tensor(drawn, dtype=torch.float32)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch with augmented images, without the parameters."""
        rest = dict(batch)
        parameters = rest.pop(AUGMENT)
        return rest | {IMAGES: self.apply(rest[IMAGES], parameters, rest["key"])}

    def apply(self, images: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
        """Return augmented images, uint8 [B, C, H, W], rounded once; parameters [B, P], keys [B] for noise."""
        for step, values in zip(self.steps, parameters.split([step.width for step in self.steps], dim=1)):
            images = step.apply(images, values, keys)
        return images.round_().clamp_(0, 255).to(torch.uint8) if images.is_floating_point() else images


def training_views(config: AugmentConfig, background: Any = DEFAULT) -> Views:
    """Return the views of a training image: `images`, and with `augment.on_device` the parameters of its changes.

    background: the colour of the padding of `augment.pad`.
    """
    images = {IMAGES: TrainTransform(config, background)}
    return {**images, AUGMENT: DeviceAugment(config)} if config.on_device else images


def evaluation_views(preprocessing: Values) -> Views:
    """Return the view of an evaluation image. preprocessing: as weight files have it."""
    stated = Preprocessing.model_validate(preprocessing)
    return {IMAGES: lambda image, _=None: on_pixels(image, prepare, stated)}
