"""train.py is finetune.py with a range test; it refuses what a run from scratch would not read."""

import pytest

from tests.in_process import configure
from utils.config.messages import ConfigError


@pytest.mark.parametrize("override", ["task.head=kept", "optim.lr=0.1"])
def test_what_a_run_from_scratch_would_not_read_is_refused(override):
    with pytest.raises(ConfigError) as refused:
        configure("train", [override])
    (problem,) = refused.value.args
    assert problem.startswith(f"{override.partition('=')[0]}: ")
    config, _ = configure("train")
    assert config.lr_finder.enabled and config.schedule.name == "onecycle"
