"""What a newcomer installs: pyproject.toml, the Makefile on machines that lack something, and the Dockerfile."""

import os
import re
import shutil
import subprocess
import tomllib
from email import message_from_string
from fnmatch import fnmatch

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = SpecifierSet(PROJECT["requires-python"])
OWN_ENVIRONMENT = "interop"


def read_requirements(file):
    """Return the requirements of a file, as text that compares."""
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    return {str(Requirement(line)) for line in lines if line and not line.startswith("#")}


def test_pip_and_uv_get_the_requirements_and_no_module(tmp_path, monkeypatch):
    """As they ask setuptools, without a network; a folder named like a room must not become a module."""
    backend = pytest.importorskip("setuptools.build_meta")
    for file in [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "README.md"]:
        shutil.copy(file, tmp_path)
    for room in ("data", "models"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    written = tmp_path / backend.prepare_metadata_for_build_editable(str(tmp_path))
    found = message_from_string((written / "METADATA").read_text())
    asked = [Requirement(text) for text in found.get_all("Requires-Dist")]
    extras = {file.stem.partition("-")[2] for file in ROOT.glob("requirements-*.txt")} - {OWN_ENVIRONMENT}
    assert set(found.get_all("Provides-Extra")) == extras
    for extra in extras:
        names = {one.name for one in asked if f'extra == "{extra}"' in str(one.marker)}
        assert names == {Requirement(text).name for text in read_requirements(f"requirements-{extra}.txt")}
    assert {str(one) for one in asked if "extra" not in str(one.marker)} == read_requirements("requirements.txt")
    assert not (written / "top_level.txt").is_file() or not (written / "top_level.txt").read_text().strip()


def test_every_place_names_the_same_pythons():
    first, last = "3.11", "3.14"
    assert [PYTHONS.contains(version) for version in ("3.10.9", first, f"{last}.9", "3.15")] == [
        False,
        True,
        True,
        False,
    ]
    assert f"Python {first} to {last}" in (ROOT / "README.md").read_text()
    made = (ROOT / "Makefile").read_text()
    assert (
        re.search(r"FITS := .*\(3, 11\) <= .* <= \(3, 14\)\)", made) and f"Python {first} to {last} is needed" in made
    )


# A Python that can do all but what a machine lacks.
FAKE = """#!/bin/sh
case "$*" in
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; {venv} ;;
    *"-m pip --version"*|*"-m ensurepip"*) {pip} ;;
    *"-m pip install"*) {install} ;;
esac
"""
WORKS = {"venv": "true", "pip": "true", "install": "true"}


def make(tmp_path, *words, **lacking):
    """Return the status and the output of make, in an environment of its own."""
    python = tmp_path / "python"
    python.write_text(FAKE.format(**WORKS | lacking))
    python.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", *words]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_make_install_makes_the_environment_and_names_what_came_before(tmp_path):
    log = tmp_path / "calls"
    calls = {"install": f'echo "$*" >> {log}'}
    assert make(tmp_path, "install", **calls)[0] == 0
    assert make(tmp_path, "install-sdxl", **calls)[0] == 0
    assert make(tmp_path, "install-view", "install-sdxl", **calls)[0] == 0
    files = [re.findall(r"-r requirements(\S*)\.txt", line) for line in log.read_text().splitlines()]
    assert files == [[""], ["", "-sdxl"], ["", "-sdxl", "-view"]]


@pytest.mark.parametrize(
    ("lacking", "words", "remedy"),
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
    if not words:
        (tmp_path / "venv/bin/python").unlink()
        assert make(tmp_path, "install")[0] == 0


def test_the_dockerfile_names_what_exists():
    """No machine of ours has Docker: its text is all that can be checked."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"} and steps[0][0] == "FROM"
    assert PYTHONS.contains(re.fullmatch(r"python:([\d.]+)-slim", steps[0][1])[1])
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert copied and all(source == "." or any(ROOT.glob(source)) for source in copied)
    asked = re.findall(r"-r (\S+)", text)
    assert "requirements.txt" in asked and all((ROOT / file).is_file() for file in asked)
    assert (ROOT / re.search(r'CMD \["python", "(\w+\.py)"', text)[1]).is_file()
    left_out = (ROOT / ".dockerignore").read_text().split()
    for name in (ROOT / ".gitignore").read_text().replace("/", "").split():  # an image holds no more than git does
        assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in left_out), name
