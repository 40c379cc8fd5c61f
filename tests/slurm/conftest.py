"""The clusters and the collection of these tests. A module states its cluster: CLUSTER, the values of Cluster."""

import pytest

from tests.in_process import make_images
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), **request.module.CLUSTER)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")
