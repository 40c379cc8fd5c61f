"""train.py is finetune.py with a range test; it refuses what a run from scratch would not read."""

import pytest

from tests.in_process import configure
from utils.config.messages import ConfigError


def test_what_a_run_from_scratch_would_not_read_is_refused():
    with pytest.raises(ConfigError) as refused:
        configure("train", ["task.head=kept"])
    (problem,) = refused.value.args
    assert problem.startswith("task.head: ")


def test_the_rate_is_searched_unless_it_is_set():
    config, _ = configure("train")
    assert config.lr_finder.enabled == "auto" and config.schedule.name == "onecycle"
    configure("train", ["optim.lr=0.1"])
    with pytest.raises(ConfigError, match="lr_finder: must be a group of keys, found True"):
        configure("train", ["lr_finder=true"])
