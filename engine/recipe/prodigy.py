"""The rate of `optim=prodigy`: a factor of the one that it finds, in place of AdamW's of a script or recipe."""

from collections.abc import Iterable

from engine.config import TrainingConfig
from utils.errors import UserError

_LEAST = 0.1  # of a factor; rates of AdamW are below


def use_factor(config: TrainingConfig, overrides: Iterable[str]) -> TrainingConfig:
    """Return the configuration of a run; with Prodigy, `optim.lr` is 1.0 where the command does not set it.

    overrides: the words of the command. Any other configuration is returned unchanged. Raises UserError (`optim.lr`).
    """
    optim = config.optim
    if optim.name != "prodigy" or (optim.lr or 0.0) >= _LEAST:
        return config
    if any(word.startswith("optim.lr=") for word in overrides):
        raise UserError(f"optim.lr: {optim.lr}, but it is a factor of the rate that Prodigy finds; set 1.0")
    return config.model_copy(update={"optim": optim.model_copy(update={"lr": optim.base_lr})})
