"""`model` follows `init_from`: where that is a run and no model is chosen, the new run has the network of the old."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from utils.record.logging import get_logger
from utils.record.run_config import CONFIG_FILE, read_run_config

if TYPE_CHECKING:
    from utils.config.entry_point import Job

log = get_logger(__name__)


def follow_init_from(values: DictConfig, job: "Job") -> "Job":
    """Set `model` in composed values to that of the run that `init_from` names; returns the job with the choice.

    A model that the command line or an experiment chooses stays. Keys of it that the command line sets, such as
    model.drop_path_rate, are kept.
    """
    source = OmegaConf.select(values, "init_from", throw_on_missing=False)
    keys = [text.lstrip("+~").partition("=")[0] for text in job.overrides]
    if "model" not in values or not source or "model" in keys or job.choices.get("experiment", "None") != "None":
        return job
    if not (Path(source) / CONFIG_FILE).is_file():
        return job
    found = read_run_config(Path(source)).get("model")
    if not isinstance(found, dict) or "name" not in found:
        return job
    given = {key: OmegaConf.select(values, key) for key in keys if key.startswith("model.")}
    values.model = {**found, **({"pretrained": False} if "pretrained" in found else {})}
    for key, value in given.items():
        OmegaConf.update(values, key, value)
    log.debug("model: %s, the network of init_from", found["name"])
    return replace(job, choices={**job.choices, "model": str(found["name"])})
