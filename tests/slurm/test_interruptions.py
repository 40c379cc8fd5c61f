"""No interruption costs a step: signals, preemption, time limits, lost ranks and nodes, on a SLURM of two nodes."""

import re
import time

import pytest
import torch

from tests.slurm.cluster import why_impossible
from tests.slurm.jobs import TRAINING, TWO_NODES, ask, submit
from tests.support import checkpoint_tensors, rows

pytestmark = pytest.mark.skipif(bool(why_impossible()), reason=str(why_impossible()))

CLUSTER, STEPS = {}, 600


@pytest.fixture(scope="module")
def undisturbed(cluster, images, tmp_path_factory):
    """The folder of a run of two ranks, on a node each."""
    folder = tmp_path_factory.mktemp("undisturbed")
    submit(cluster, folder, *TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}").wait_for(0)
    return folder / "run"


def assert_nothing_lost(submission, undisturbed, restarts=1):
    """Every step once, and the weights of the run that nothing disturbed."""
    submission.assert_ended(0, restarts)
    steps = [row["step"] for row in rows(submission.folder / "run/metrics.jsonl", "train")]
    assert steps == list(range(1, STEPS + 1))
    ours, theirs = (checkpoint_tensors(folder, STEPS) for folder in (submission.folder / "run", undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_saves_requeues_and_continues(cluster, images, undisturbed, tmp_path):
    words = [*TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(150)
    ask(cluster, "scancel", "--signal=USR2", submission.job)
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)
    stopped = int(re.search(r"stopped at step (\d+)", submission.log()).group(1))
    assert f"resumed from {tmp_path}/run/checkpoints/step_{stopped:08d} at step {stopped}" in submission.log()
    for task, node in enumerate(cluster.names):
        assert f"[{node}, task {task}] " in submission.log(task)


def test_a_job_gives_way_to_a_more_important_one(cluster, images, undisturbed, tmp_path):
    """And continues in its W&B run too."""
    tracking = ["tracking=wandb", "tracking.mode=offline"]
    words = [*TWO_NODES, "launch.partition=low", *TRAINING, *tracking, f"data.root={images}"]
    submission = submit(cluster, tmp_path, *words, f"loop.total_steps={STEPS}")
    submission.wait_for_step(150)
    started = time.monotonic()
    ask(cluster, "srun", "--partition=main", "--nodes=2", "--exclusive", "true")
    assert time.monotonic() - started < 30
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)
    name = (tmp_path / "run/wandb_run_id.txt").read_text().strip()
    starts = [folder.name.rpartition("-")[2] for folder in tmp_path.glob("run/wandb/offline-run-*")]
    assert starts == [name, name]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_fails_costs_no_run(lost, cluster, images, undisturbed, tmp_path):
    """The first one takes the job's own script along, and SLURM requeues it; the other one is missed by our ranks."""
    node = cluster.names[lost]
    words = [*TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(150)
    (cluster.lose_node if lost == 0 else cluster.kill_node)(node)
    submission.wait_until(lambda: ask(cluster, "squeue", "-h", "-t", "RUNNING", "-o", "%N") == "", f"the end of {node}")
    cluster.start_node(node)
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)


NEAR_ITS_END = ["launch.time_min=10", "launch.stop_before_end_sec=120"]


def shorten_time(cluster, submission):
    """Leave the job at most two minutes, so that SLURM asks it to save now, and not before its first step."""
    minutes = int(ask(cluster, "squeue", "-h", "-j", submission.job, "-o", "%M").split(":")[-2])
    ask(cluster, "scontrol", "update", f"JobId={submission.job}", f"TimeLimit={minutes + 2}")


def test_a_time_limit_is_no_end(cluster, images, tmp_path):
    """The job is asked to save before, and goes on where it was."""
    words = [*TWO_NODES, *NEAR_ITS_END, *TRAINING, f"data.root={images}", "loop.total_steps=1000000"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(20)
    shorten_time(cluster, submission)
    submission.wait_until(lambda: "the job continues in the queue" in submission.log(), "the end of its time")
    ask(cluster, "scontrol", "update", f"JobId={submission.job}", "TimeLimit=10")
    submission.wait_until(lambda: re.search(r"resumed from .* at step (\d+)", submission.log()), "a restart")
    stopped = int(re.search(r"resumed from .* at step (\d+)", submission.log()).group(1))
    submission.wait_for_step(stopped + 20)
    ask(cluster, "scancel", submission.job)
    submission.wait_for(1)
    steps = [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "train")]
    assert stopped >= 20 and steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 20


def test_the_last_time_limit_that_a_job_may_reach_is_its_end(cluster, images, tmp_path):
    """It has saved, so its status is 75."""
    words = [*TWO_NODES, *NEAR_ITS_END, "launch.max_requeues=0", *TRAINING, f"data.root={images}"]
    submission = submit(cluster, tmp_path, *words, "loop.total_steps=1000000")
    submission.wait_for_step(20)
    shorten_time(cluster, submission)
    submission.wait_for(75)
    submission.assert_ended(75, restarts=0)
    assert "stopped at step" in submission.log()
    assert ask(cluster, "squeue", "-h") == ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_on_each_node(nodes, cluster, images, undisturbed, tmp_path):
    """Its ranks are those of srun, on one node and on two; and it is asked to save too."""
    size = ["launch.gpus_per_node=2"] if nodes == 1 else TWO_NODES
    words = [*size, "launch.start=torchrun", "launch.wait=true", *TRAINING, f"data.root={images}"]
    submission = submit(cluster, tmp_path, *words, f"loop.total_steps={STEPS}")
    submission.wait_for_step(150)
    ask(cluster, "scancel", "--signal=USR2", submission.job)
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)
    assert f"torch.distributed.run --nnodes={nodes}" in submission.log()
    logs = list(tmp_path.glob(f"outputs/slurm/*/logs/{submission.job}_*_ranks/*/attempt_0/*/stderr.log"))
    assert len(logs) == 4  # two starts of two ranks


def test_sigterm_alone_is_enough_and_scancel_is_an_end(cluster, images, tmp_path):
    """A site may send no other signal before a preemption: status 75 requeues. What a user cancels stays cancelled."""
    words = [*TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(100)
    job = submission.job
    ask(cluster, "scancel", "--signal=TERM", job)
    submission.wait_until(
        lambda: "at step" in submission.log() and "resumed from" in submission.log(), "the resumption"
    )
    ask(cluster, "scancel", job)
    output = submission.wait_for(1)
    assert f"job {job} has ended as CANCELLED" in output and ask(cluster, "squeue", "-h") == ""


def test_a_rank_that_is_lost_again_and_again_ends_the_job(cluster, images, tmp_path):
    """max_lost_ranks=0: the loss of the other node's rank is the end; the log names the rank."""
    words = [*TWO_NODES, "launch.max_lost_ranks=0", *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(50)
    cluster.kill_node(cluster.names[1])
    submission.wait_until(lambda: "finetune.py has ended with status 70" in submission.log(), "the end of its script")
    cluster.start_node(cluster.names[1])
    submission.wait_for(70)
    submission.assert_ended(70, restarts=0)
    assert "rank 1 has died: no sign of life" in submission.log()
