"""A cluster for each file of tests, beside those of other processes, and the collection."""

import os

import pytest

from tests.in_process import make_images
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    process = os.getpid()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), port=10_000 + process % 5000 * 4, prefix=f"n{process}x")
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")
