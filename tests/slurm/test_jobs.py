"""Jobs on a real SLURM of two nodes: what is queued, what is refused; sweeps and failures."""

import re

import pytest

from submit.slurm import list_jobs, split_words
from tests.slurm.cluster import why_impossible
from tests.slurm.jobs import TRAINING, Submission, ask

pytestmark = pytest.mark.skipif(bool(why_impossible()), reason=str(why_impossible()))


def test_a_sweep_is_one_array(cluster, images, tmp_path):
    """A job that fails does not end the others; the same sweep again runs what is missing."""
    words = ["--multirun", "optim.lr=0.01,0.02", "sweep.name=rates", "launch.gpus_per_node=0",
             *(word for word in TRAINING if not word.startswith("optim.lr")), f"data.root={images}",
             "loop.total_steps=4"]  # fmt: skip
    folder = list_jobs("finetune", split_words(words)[1])[1][1][-1].removeprefix("run_dir=")
    in_the_way = tmp_path / folder  # no folder: its job fails
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    Submission(cluster, tmp_path, words).wait_for((0, 0), (2, 0))
    assert len(list(tmp_path.glob("outputs/sweeps/rates/*/complete.json"))) == 1
    in_the_way.unlink()
    again = Submission(cluster, tmp_path, words)
    again.wait_for((0, 0))
    assert "1 of the 2 jobs are complete already" in again.said
    assert len(list(tmp_path.glob("outputs/sweeps/rates/*/complete.json"))) == 2


def test_what_slurm_refuses_is_said_in_its_words(cluster, images, tmp_path):
    words = [*TRAINING, f"data.root={images}", "loop.total_steps=20", "launch.gpus_per_node=0"]
    output = Submission(cluster, tmp_path, ["launch.sbatch={partition:none}", *words], status=2).said
    assert re.search(r"launch: SLURM refuses the job: .*[Ii]nvalid partition", output), output
    assert "Traceback" not in output
    assert str(tmp_path) not in ask(cluster, "squeue", "-h", "-o", "%Z")
