"""A cluster for each file of tests, beside those of other processes, and the collection."""

import os

import pytest

from tests.in_process import make_images
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    process = os.getpid()
    port = 30_000 + process % 900 * 3  # above the ports where ranks meet, below Linux's own
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), port=port, prefix=f"n{process}x")
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")
