"""The views of an image: what training and what evaluation makes of it (`Views` of data/stream/order.py)."""

from typing import Any

from data.augment.config import AugmentConfig
from data.augment.steps import AUGMENT, IMAGES, DeviceAugment, TrainTransform
from data.augment.transforms import EvalTransform
from data.stream.order import Views
from utils.formats.background import DEFAULT
from utils.io.files import Values


def training_views(config: AugmentConfig, background: Any = DEFAULT) -> Views:
    """Return the views of a training image: `images`, and with `augment.on_device` the parameters of its changes.

    background: the colour of the padding of `augment.pad`.
    """
    images = {IMAGES: TrainTransform(config, background)}
    return {**images, AUGMENT: DeviceAugment(config)} if config.on_device else images


def evaluation_views(preprocessing: Values) -> Views:
    """Return the view of an evaluation image."""
    return {IMAGES: EvalTransform(preprocessing)}
