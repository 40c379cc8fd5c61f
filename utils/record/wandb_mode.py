"""Which mode W&B runs in, and why."""

import os
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.record.config import WandbTrackingConfig

_MODES = ("online", "offline", "disabled")


class Mode(NamedTuple):
    """online, offline or disabled; and the reason, to follow `because`."""

    mode: str
    reason: str


def import_wandb() -> Any:
    """Return the wandb package, without its reports of errors to its maker, which only make noise where it is down."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # takes 0.6 s

    return wandb


def choose_mode(options: WandbTrackingConfig) -> Mode:
    """Return the mode that `tracking.mode` means here.

    Raises UserError where online is asked for and no API key is found, or an unknown WANDB_MODE is set. Asks no server:
    a key that W&B refuses is found by the tracker, which then records offline.
    """
    asked, where = options.mode, f"tracking.mode={options.mode}"
    if asked == "auto" and (variable := os.environ.get("WANDB_MODE")):
        if variable not in _MODES:
            raise UserError(
                f"tracking.mode: auto takes WANDB_MODE, and {variable!r} is not one of {', '.join(_MODES)}; change or "
                "unset it, or set tracking.mode"
            )
        asked, where = variable, f"WANDB_MODE={variable}"
    if asked in ("offline", "disabled"):
        return Mode(asked, f"{where} is set")
    problem = find_problem()
    if problem is None:
        return Mode("online", f"{where} is set" if asked == "online" else "an API key was found")
    if asked == "auto":
        return Mode("offline", f"{problem}; `wandb login` stores one")
    raise UserError(
        f"tracking.mode: online was asked for ({where}), and {problem}; run `wandb login` once, or set "
        "tracking.mode=offline and send the run later with `wandb sync`"
    )


def find_problem() -> str | None:
    """Return what is wrong with the user's API key, None for nothing."""
    wandb = import_wandb()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))  # login looks for no key in another mode
        known = wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:  # the form of a key; the value of a WANDB_ variable
        return f"W&B refuses its settings ({' '.join(str(error).split())})"
    return None if known else "no API key was found"
