"""Start from timm's weights, with the mean, std, crop and interpolation of their training."""

from collections.abc import Iterable
from typing import Any

from data.augment.config import AugmentConfig
from engine.config import TrainingConfig
from models.config import TimmConfig
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


def stated_preprocessing(model: TimmConfig) -> dict[str, Any]:
    """Return the keys of `augment` that timm states for a network's weights.

    For one channel, mean and std are averaged, as in timm. Raises UserError if timm does not know the network, or if
    `augment` cannot express its preprocessing.
    """
    import timm

    try:
        config = timm.get_pretrained_cfg(model.name) if timm.is_model(model.name) else None
    except RuntimeError:  # an unknown tag
        config = None
    if config is None:
        known = ", ".join(timm.list_pretrained(f"{model.name.split('.')[0]}.*")[:8]) or "none for that network"
        raise UserError(f"timm has no weights named {model.name!r}; it has {known}")
    known = config.crop_mode in ("center", "squash") and config.interpolation in ("bilinear", "bicubic")
    if not known or not 0 < config.crop_pct <= 1:
        raise UserError(
            f"timm prepares the images of {model.name} with crop_mode {config.crop_mode}, crop_pct "
            f"{config.crop_pct} and interpolation {config.interpolation}, which augment cannot express; choose "
            "another network, or set init_from=FILE (the weight file) and your own augment"
        )
    mean, std = list(config.mean), list(config.std)
    if model.in_channels != len(mean):
        mean, std = ([sum(values) / len(values)] * model.in_channels for values in (mean, std))
    return {
        "image_size_hw": list(config.input_size[1:]),
        "mean": mean,
        "std": std,
        "eval_crop": float(config.crop_pct),
        "eval_resize": "squash" if config.crop_mode == "squash" else "crop",
        "interpolation": config.interpolation,
    }
