"""Start from timm's weights, with the mean, std, crop and interpolation of their training."""

from collections.abc import Iterable

from data.augment.config import AugmentConfig
from engine.config import TrainingConfig
from models.config import TimmConfig
from models.weights.timm_hub import stated_preprocessing
from utils.errors import UserError, about
from utils.record.logging import get_logger

log = get_logger(__name__)


def use_pretrained(config: TrainingConfig, overrides: Iterable[str]) -> TrainingConfig:
    """Return the configuration of a run; with `init_from=timm`, `augment` takes over timm's preprocessing.

    overrides: the words of the command, whose keys stay. Any other configuration is returned unchanged. Raises
    UserError if timm has no weights for the network.
    """
    model = config.model
    if config.init_from != "timm":
        return config
    if not isinstance(model, TimmConfig):
        raise UserError(
            f"init_from: timm has weights for its own networks, not for {model.name}; set model=timm "
            f"model.name={model.name}, or give a weight file"
        )
    with about("model.name"):
        preprocessing = stated_preprocessing(model)
    size_hw = preprocessing.pop("image_size_hw")
    for word in overrides:
        preprocessing.pop(word.partition("=")[0].removeprefix("augment."), None)
    log.info(
        "augment: taken over from timm's %s: %s; its images were %d x %d, here they are %d x %d", model.name,
        ", ".join(f"{key}={value}" for key, value in preprocessing.items()), *size_hw, *config.augment.image_size_hw,
    )  # fmt: skip
    augment = AugmentConfig.model_validate({**config.augment.model_dump(), **preprocessing})
    return config.model_copy(update={"augment": augment})
