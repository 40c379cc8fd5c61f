"""A run's config.json: damage is an error that names the file."""

import pytest

from utils.errors import UserError
from utils.record.run_config import read_run_config


@pytest.mark.parametrize("text", ['{"seed": NaN}', '{"seed": 1', "[]"])
def test_a_damaged_configuration_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^run_dir: .*config\.json is damaged"):
        read_run_config(tmp_path)
