"""The batch of a small collection."""

from collections.abc import Iterable

from data.collection.choose import training_rows
from data.collection.collection import Collection
from engine.config import TrainingConfig
from utils.record.logging import get_logger

log = get_logger(__name__)

_LEAST = 8  # images of an update, so that batch norms have something to average and several ranks share it


def fit_batch(config: TrainingConfig, collection: Collection, overrides: Iterable[str]) -> TrainingConfig:
    """Return the configuration of a run with a batch of no more than the training images, in powers of two.

    In a larger batch an image stands several times: work that teaches nothing. The rate is that of the recipe's batch,
    whose gradient is as sure. Chunks of one shape keep their batch. overrides: the words of the command, whose batch
    stays.
    """
    loop = config.loop
    images = len(training_rows(collection, loop))
    size = max(_LEAST, 1 << images.bit_length() >> 1)
    is_stated = any(word.startswith("loop.batch_size=") for word in overrides)
    if is_stated or size >= loop.batch_size or hasattr(config.task, "chunk"):
        return config
    log.info("loop.batch_size: %d for %d training images, at the rate of %d", size, images, loop.batch_size)
    base_lr = config.optim.base_lr * loop.batch_size / size
    loop = loop.model_copy(update={"batch_size": size})
    return config.model_copy(update={"loop": loop, "optim": config.optim.model_copy(update={"base_lr": base_lr})})
