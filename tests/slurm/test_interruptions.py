"""No interruption costs a step: signals, preemption, time limits, lost ranks and nodes, on a SLURM of two nodes."""

import re

import pytest

from tests.slurm.cluster import why_impossible
from tests.slurm.jobs import TRAINING, TWO_NODES, ask, submit, wait_until
from tests.support import assert_same_tensors, checkpoint_tensors, logged, run
from utils.record.run_reader import RunReader

pytestmark = pytest.mark.skipif(bool(why_impossible()), reason=str(why_impossible()))

STEPS = 1000


@pytest.fixture
def start(cluster, images, tmp_path):
    """Return what submits a job of two nodes, and waits for a step of its training."""

    def go(*words, step=50):
        training = [*TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
        submission = submit(cluster, tmp_path, *TWO_NODES, *training, *words)
        submission.wait_for_step(step)
        return submission

    return go


def test_a_job_continues_after_a_signal_a_preemption_and_the_loss_of_each_node(cluster, start, images, tmp_path):
    """Bit for bit as two ranks without SLURM.

    Our ranks miss the second node; the first takes the job's own script along, and SLURM requeues it.
    """
    submission = start("launch.sbatch={partition:low}")
    first, second = cluster.names

    def wait_for_resumption(number):
        resumed = rf"resumed from {tmp_path}/run/checkpoints/step_\d+ at step (\d+)"
        submission.wait_until(lambda: len(re.findall(resumed, submission.log())) == number, "a resumption")
        found = re.findall(resumed, submission.log())
        submission.wait_for_step(int(found[-1]) + 20)
        return int(found[-1])

    # A site may send no other signal before a preemption.
    ask(cluster, "scancel", "--signal=TERM", submission.job)
    submission.wait_until(lambda: RunReader(tmp_path / "run").progress["state"] == "requeued", "its mark")
    resumed = wait_for_resumption(1)
    assert resumed == int(re.search(r"stopped at step (\d+)", submission.log()).group(1))
    for task, node in enumerate(cluster.names):
        assert f"[{node}, task {task}] " in submission.log(task)

    ask(cluster, "srun", "--partition=main", "--nodes=2", "--exclusive", "true")
    wait_for_resumption(2)

    for number, (lose, node) in enumerate([(cluster.kill_node, second), (cluster.lose_node, first)], start=3):
        lose(node)
        submission.wait_until(lambda: ask(cluster, "squeue", "-h", "-t", "RUNNING", "-o", "%N") == "", "the end")
        cluster.start_node(node)
        wait_for_resumption(number)

    submission.wait_for((0, 4))
    assert logged(tmp_path / "run", "train", "step") == list(range(1, STEPS + 1))
    undisturbed = [f"data.root={images}", f"loop.total_steps={STEPS}", f"run_dir={tmp_path}/undisturbed"]
    run("finetune.py", [*TRAINING, *undisturbed], tmp_path, ranks=2)
    assert_same_tensors(*(checkpoint_tensors(tmp_path / name, STEPS) for name in ("run", "undisturbed")))


def test_the_last_time_limit_that_a_job_may_reach_is_its_end(cluster, start):
    """It has saved, so its status is 75."""
    near_its_end = ["launch.time_min=10", "launch.stop_before_end_sec=120", "launch.max_requeues=0"]
    submission = start(*near_its_end, "loop.total_steps=1000000", step=20)
    minutes = int(ask(cluster, "squeue", "-h", "-j", submission.job, "-o", "%M").split(":")[-2])
    # SLURM asks it to save now.
    ask(cluster, "scontrol", "update", f"JobId={submission.job}", f"TimeLimit={minutes + 2}")
    submission.wait_for((75, 0))
    assert "stopped at step" in submission.log()
    wait_until(lambda: ask(cluster, "squeue", "-h") == "", "an empty queue")  # SLURM ends a job after our own word


def test_scancel_is_an_end(cluster, start):
    submission = start(step=20)
    ask(cluster, "scancel", submission.job)
    wait_until(lambda: ask(cluster, "squeue", "-h") == "", "the end")
    assert not submission.ends and "finetune.py has ended with status 75" in submission.log()
