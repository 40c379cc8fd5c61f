"""Start from timm's weights, with the mean, std, crop and interpolation of their training."""

from engine.tasks.change import AnyConfig, Start
from models.config import TimmConfig
from utils.config.command_line import By
from utils.errors import UserError, about
from utils.record.logging import log


def take_preprocessing(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration of a run with `init_from=timm`: `augment` takes over timm's preprocessing.

    Stated keys stay. Raises UserError if timm has no weights for the network.
    """
    model = config.model
    if not isinstance(model, TimmConfig):
        raise UserError(
            f"init_from: timm has weights for its own networks, not for {model.name}; set model=timm "
            f"model.name={model.name}, or give a weight file"
        )
    from models.weights.timm_hub import stated_preprocessing

    with about("model.name"):
        preprocessing = stated_preprocessing(model)
    size_hw = preprocessing.pop("image_size_hw")
    log.info(
        "augment.image_size_hw: timm's %s was trained on %d x %d, here images are %d x %d", model.name,
        *size_hw, *config.augment.image_size_hw,
    )  # fmt: skip
    least = min(start.job.stated("init_from"), By.CHOICE)
    taken = {f"augment.{key}": value for key, value in preprocessing.items()}
    return config.changed({key: value for key, value in taken.items() if not start.job.states(key, least)})
