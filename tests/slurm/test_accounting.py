"""Jobs on a SLURM that keeps accounts: who may submit, and that a job is waited for as without them."""

import pytest

from tests.slurm.accounting import missing_programs
from tests.slurm.cluster import why_impossible
from tests.slurm.jobs import TRAINING, ask, submit, wait_until

MISSING = why_impossible() or ", ".join(missing_programs())
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not here: {MISSING}")
CLUSTER = {"nodes": 1, "port": 16917, "prefix": "a", "keeps_accounts": True}


@pytest.fixture(scope="module")
def words(images):
    return [*TRAINING, f"data.root={images}", "loop.total_steps=4", "launch.gpus_per_node=0", "launch.wait=true"]


def test_a_job_of_an_account_runs_and_is_in_the_books(cluster, words, tmp_path):
    submission = submit(cluster, tmp_path, "launch.account=vision", *words)
    assert "has ended with status 0" in submission.wait_for(0)
    books = ["sacct", "-n", "-X", "-j", submission.job, "-o", "State,Account"]  # written a moment after the end
    wait_until(lambda: ask(cluster, *books).split() == ["COMPLETED", "vision"], "the books", 30)


@pytest.mark.parametrize(("key", "value"), [("account", "nobody"), ("qos", "none")])
def test_an_account_or_a_quality_that_is_not_ours_is_refused(cluster, words, key, value, tmp_path):
    output = submit(cluster, tmp_path, f"launch.{key}={value}", *words).wait_for(2)
    refusal = (
        f"launch.{key}: SLURM refuses the job ({value!r} was asked for): Batch job submission failed: Invalid {key}"
    )
    assert refusal in output and ask(cluster, "squeue", "-h") == ""
