"""Start from timm's weights or a tagger, with the mean, std, crop and interpolation of their training."""

from engine.tasks.change import AnyConfig, Start
from engine.tasks.opening import stated_by_tagger
from models.config import TimmConfig
from utils.config.command_line import By
from utils.errors import UserError, about
from utils.io.files import Json
from utils.record.logging import log


def take_stated(config: AnyConfig, start: Start) -> AnyConfig:
    """Return the configuration of a run with what `init_from` states: timm, or for a tagger another tagger.

    `augment` takes over the preprocessing, `model` the network. Stated keys stay.
    Raises UserError if timm has no weights for the network.
    """
    changes = _stated_by_timm(config) if config.init_from == "timm" else stated_by_tagger(config)
    least = min(start.job.stated("init_from"), By.CHOICE)
    return config.changed({key: value for key, value in changes.items() if not start.job.states(key, least)})


def _stated_by_timm(config: AnyConfig) -> Json:
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
    return {f"augment.{key}": value for key, value in preprocessing.items()}
