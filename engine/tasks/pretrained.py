"""timm's weights as a start: with them come the mean, std, crop and interpolation that they were trained with."""

from typing import Any, TypeVar

from data.config import AugmentConfig
from engine.config import TrainingConfig
from models.config import TimmConfig
from utils.errors import UserError
from utils.io.weights import refuse_average
from utils.record.logging import get_logger

log = get_logger(__name__)
Config = TypeVar("Config", bound=TrainingConfig)
# What `augment` can express of timm's preprocessing.
_EXPRESSIBLE = {
    "crop_pct": ("a share up to 1",),
    "crop_mode": ("center", "squash"),
    "interpolation": ("bilinear", "bicubic", "lanczos"),
}


def use_pretrained(config: Config) -> Config:
    """Return the configuration of a run that begins with timm's weights; any other as it is.

    `model.pretrained=true` becomes `init_from=timm`, and `augment` takes over what timm states for the weights,
    which is logged. Raises UserError where two keys name weights, timm has none for the network, or `init_weights` asks
    for an average of them.
    """
    asks = isinstance(config.model, TimmConfig) and config.model.pretrained
    if asks and config.init_from not in (None, "timm"):
        raise UserError(
            f"model.pretrained: true, and init_from names other weights ({config.init_from}); keep one of the two"
        )
    if not asks and config.init_from != "timm":
        return config
    refuse_average(config.init_weights, "the weights of timm have no average beside them")
    model, augment = config.model, config.augment
    if not isinstance(model, TimmConfig):
        raise UserError(
            f"init_from: timm gives weights to its own networks, not to {model.name}; set model=timm "
            f"model.name={model.name}, or give a weight file"
        )
    stated = stated_preprocessing(model, "init_from", "give the weight file and an augment of yours: init_from=FILE")
    height, width = stated.pop("image_size_hw")
    changed = [key for key, value in stated.items() if getattr(augment, key) != value]
    log.info(
        "augment: taken over from timm's %s: %s%s; its images were %d x %d, here they are %d x %d", model.name,
        ", ".join(f"{key}={value}" for key, value in stated.items()),
        f" (changed: {', '.join(changed)})" if changed else "", height, width, *augment.image_size_hw,
    )  # fmt: skip
    augment = AugmentConfig.model_validate({**augment.model_dump(), **stated})
    return config.model_copy(update={"init_from": "timm", "augment": augment})


def stated_preprocessing(model: TimmConfig, key: str, advice: str, name_key: str = "model.name") -> dict[str, Any]:
    """Return the keys of `augment` that timm states for a network's weights.

    For one channel mean and std are averages, as timm has it. Raises UserError (`name_key`) where timm does not know
    the network, and UserError (`key`, with advice) for a preprocessing that `augment` cannot express.
    """
    import timm

    try:
        config = timm.get_pretrained_cfg(model.name) if timm.is_model(model.name) else None
    except RuntimeError:  # a tag that it does not know
        config = None
    if config is None:
        known = ", ".join(timm.list_pretrained(f"{model.name.split('.')[0]}.*")[:8]) or "none of that network"
        raise UserError(f"{name_key}: timm has no weights named {model.name!r}; it has {known}")
    for name, allowed in _EXPRESSIBLE.items():
        if not (0 < config.crop_pct <= 1 if name == "crop_pct" else getattr(config, name) in allowed):
            raise UserError(
                f"{key}: timm prepares the images of {model.name} with {name} {getattr(config, name)}, and augment "
                f"expresses {', '.join(allowed)}; {advice}"
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
