"""Before the first update, a training names what is wrong with its figures; it is silent about honest collections."""

import re

import pytest

from tests.in_process import run
from tests.validity.makers import CASES, make
from utils.errors import UserError

START = [
    "train", "data.root=in", "loop.minutes=1", "dry_run=true", "runtime.device=cpu", "runtime.threads=1", "run_dir=run",
]  # fmt: skip
SILENT = r"\A(?![^\0]*\n  validity +(?! |few validation images))"  # which is true of all of them


@pytest.mark.parametrize("name", CASES)
def test_a_start_names_traps_and_is_silent_about_honest_collections(name, tmp_path, capsys):
    row = make(name, tmp_path / "in")
    script, *words = row.get("command", START)
    try:
        lines = f"{run(script, words, tmp_path)}{capsys.readouterr().err}"
    except UserError as refusal:
        lines = str(refusal)
    assert re.search(row.get("says", SILENT), lines), lines
