"""`model` follows `init_from`: where that is a run and no model is chosen, the new run has the network of the old."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from utils.record.logging import get_logger
from utils.record.run_reader import CONFIG_FILE, RunReader

log = get_logger(__name__)


def follow_init_from(values: DictConfig, overrides: Sequence[str], choices: Mapping[str, str]) -> dict[str, str]:
    """Set `model` in composed values to that of the run that `init_from` names; returns the choices with it.

    A model that the command line or an experiment chooses stays. Keys of it that the command line sets, such as
    model.drop_path_rate, are kept.
    """
    source = OmegaConf.select(values, "init_from", throw_on_missing=False)
    keys = [text.lstrip("+~").partition("=")[0] for text in overrides]
    is_chosen = "model" in keys or choices.get("experiment", "None") != "None"
    if "model" not in values or not source or is_chosen or not (Path(source) / CONFIG_FILE).is_file():
        return dict(choices)
    found = RunReader(Path(source)).config.get("model")
    if not isinstance(found, dict) or "name" not in found:
        return dict(choices)
    given = {key: OmegaConf.select(values, key) for key in keys if key.startswith("model.")}
    values.model = found
    for key, value in given.items():
        OmegaConf.update(values, key, value)
    log.debug("model: %s, the network of init_from", found["name"])
    return {**choices, "model": str(found["name"])}
