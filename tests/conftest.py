"""Every test process runs with one thread: on two cores, two processes with default threads slow each other tenfold."""

import logging
import os
import subprocess
import sys
from contextlib import contextmanager

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes, each of which imports torch
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else the fork server's question for a GPU bars its forks from it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; a local one is in tests/models/test_offers.py

import fsspec
import pytest
import torch

from data.images import further
from data.layouts import names
from tests.support import draw_nothing, make_collection
from utils.errors import find_lack
from utils.record.logging import ROOT

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """Return a collection of 54 training and 15 validation images in three class folders, with tags."""
    return make_collection(tmp_path_factory.mktemp("collection") / "images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of a module's tests."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture(scope="module")
def store():
    """Return the store of a local S3 server, where s3:// leads."""
    pytest.importorskip("s3fs", reason="make install-cloud")
    from moto.server import ThreadedMotoServer  # imports flask

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    place = {"key": "a", "secret": "b", "endpoint_url": "http://{}:{}".format(*server.get_host_and_port())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", place)
        yield fsspec.filesystem("s3")
    server.stop()


@pytest.fixture
def log(caplog, monkeypatch):
    """Return caplog with what our logger says, reasons (DEBUG) too, whatever other tests did to logging."""
    ours = logging.getLogger(ROOT)
    monkeypatch.setattr(ours, "disabled", False)
    monkeypatch.setattr(ours, "propagate", False)  # else a message comes twice
    monkeypatch.setattr(ours, "handlers", [*ours.handlers, caplog.handler])
    caplog.set_level(logging.DEBUG, ROOT)
    return caplog


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs within the test's process draw no plots/curves.png."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.record.plots.plot_curves", draw_nothing)
        yield


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were just written count as old ones."""
    monkeypatch.setattr("utils.io.memo._YOUNG_SEC", 0)


@pytest.fixture
def without_formats(monkeypatch):
    """The packages of requirements-formats.txt are not installed."""
    further.load_package.cache_clear()
    for package, (module, endings) in names.FURTHER.items():
        monkeypatch.setitem(sys.modules, module, None)
        for ending in endings:
            monkeypatch.setitem(names.MISSING, ending, package)
    monkeypatch.setattr(names, "IMAGE_SUFFIXES", tuple(e for e in names.IMAGE_SUFFIXES if e not in names.MISSING))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip what needs the packages of an extra; the reason is what the program says to a user."""
    with skipping_without_extras():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what needs the packages of an extra."""
    with skipping_without_extras():
        return (yield)


@contextmanager
def skipping_without_extras():
    try:
        yield
    except ModuleNotFoundError as error:
        missing = find_lack(error)
        if "make install-" not in missing:
            raise
        raise pytest.skip.Exception(missing, _use_item_location=True) from None


def pytest_addoption(parser):
    """Add the flag that rewrites the golden curves; the diff is for review."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/engine/golden_losses.json")


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of its own, of 1 MiB; unmounted at the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
