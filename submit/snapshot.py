"""A copy of the code for a job: what waits in the queue does not change with the working tree."""

import shutil
from pathlib import Path

from utils.config.help import ROOT
from utils.io.files import write_json
from utils.record.run_folder import GIT_FILE, git_state

# The rooms, which are packages, and their configuration.
FOLDERS = ["conf", *sorted(file.parent.name for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests")]


def copy_code(target: Path) -> None:
    """Copy the root scripts, the rooms and the state of git into a new folder."""
    target.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy2(file, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_json(target / GIT_FILE, git_state())
