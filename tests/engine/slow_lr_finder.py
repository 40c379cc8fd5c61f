"""The range test on two ranks."""

import json

import pytest

from tests.engine.test_lr_finder import SEARCH, searched  # noqa: F401 (a fixture)
from tests.in_process import run
from tests.support import assert_same_rows
from tests.support import run as run_ranks


@pytest.mark.ddp
def test_two_ranks_find_the_rate_of_one(searched):  # noqa: F811
    """With replicated and with sharded parameters; the run after it is the same up to summation order."""
    folder, base = searched
    run("finetune", [*base, *SEARCH, f"run_dir={folder}/one"], folder)
    one = json.loads((folder / "one/lr_finder.json").read_text())
    for name in ("ddp", "fsdp"):
        run_ranks(
            "finetune.py", [*base, *SEARCH, f"runtime.parallel={name}", f"run_dir={folder}/{name}"], folder, ranks=2
        )
        other = json.loads((folder / name / "lr_finder.json").read_text())
        assert other["taken"] == one["taken"]
        assert other["losses"][:60] == pytest.approx(one["losses"][:60], rel=1e-4)  # before they diverge
        assert_same_rows(folder / "one", folder / name, 1e-3)
