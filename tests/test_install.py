"""What a newcomer installs: pyproject.toml, the Makefile on machines that lack something, and the Dockerfile."""

import os
import re
import subprocess
import tomllib

import pytest

from tests.support import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pip_and_uv_get_the_requirements_and_no_module():
    extras = {file.stem.partition("-")[2]: {"file": file.name} for file in ROOT.glob("requirements-*.txt")}
    del extras["interop"]  # an environment of its own
    assert PYPROJECT["tool"]["setuptools"] == {
        "packages": [],
        "dynamic": {"dependencies": {"file": "requirements.txt"}, "optional-dependencies": extras},
    }


def test_every_place_names_the_same_pythons():
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.15"
    assert all("Python 3.11 to 3.14" in (ROOT / file).read_text() for file in ("README.md", "Makefile"))
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in (ROOT / "Makefile").read_text()


def test_the_dockerfile_names_what_exists():
    """No machine of ours has Docker: its text is all that can be checked."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.1[1-4]-slim$", text, re.MULTILINE)
    named = re.findall(r"[\w-]+\.(?:txt|py)\b", text)
    assert {"requirements.txt", "train.py"} <= {*named} and all((ROOT / name).is_file() for name in named)


# A Python that can do all but what a machine lacks.
FAKE = """#!/bin/sh
case "$*" in
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; {venv} ;;
    *"-m pip --version"*|*"-m ensurepip"*) {pip} ;;
    *"-m pip install"*) {install} ;;
esac
"""


def make(tmp_path, *words, **lacking):
    """Return the status and the output of make, in an environment of its own."""
    python = tmp_path / "python"
    python.write_text(FAKE.format(**{"venv": "true", "pip": "true", "install": "true"} | lacking))
    python.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", *words]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_make_install_makes_the_environment_and_names_what_came_before(tmp_path):
    log = tmp_path / "calls"
    for words in (["install"], ["install-sdxl"], ["install-cloud", "install-view", "install-sdxl"]):
        assert make(tmp_path, *words, install=f'echo "$*" >> {log}')[0] == 0
    files = [re.findall(r"-r requirements(\S*)\.txt", line) for line in log.read_text().splitlines()]
    assert files == [[""], ["", "-sdxl"], ["", "-cloud", "-sdxl", "-view"]]


@pytest.mark.parametrize(
    "lacking, words, remedy",
    [
        ({}, ["PYTHON=/nowhere/python3"], "PYTHON=/path"),
        ({"venv": "exit 1", "pip": "exit 1"}, [], "apt install python3-venv"),
        ({"install": "exit 1"}, [], "docs/install.md"),
    ],
)
def test_make_install_names_the_remedy(tmp_path, lacking, words, remedy):
    for _ in range(2):  # what a failure leaves behind does not hide it
        status, said = make(tmp_path, "install", *words, **lacking)
        assert status == 2 and remedy in said
