"""Jobs on a real SLURM of two nodes: what is queued, what is refused, and that no interruption costs a step."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.in_process import SMALL_MODEL, make_images
from tests.slurm.cluster import Cluster, why_impossible
from tests.support import ROOT, checkpoint_tensors, rows

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_impossible()), reason=str(why_impossible()))]

STEPS = 600
TRAINING = [
    *SMALL_MODEL, "augment.image_size_hw=[16,16]", "loop.global_batch_size=4", "loop.batch_size=2", "runtime=reference",
    "runtime.device=cpu", "runtime.threads=1", "loop.log_every_steps=1", "loop.evaluate_every_epochs=1000",
    "loop.checkpoint_every_steps=100", "data=image_folder", "optim.lr=0.01",
]  # fmt: skip
TWO_NODES = ["launch.nodes=2", "launch.gpus_per_node=0", "launch.wait=true"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def undisturbed(cluster, images, tmp_path_factory):
    """The folder of a run of two ranks, on a node each."""
    folder = tmp_path_factory.mktemp("undisturbed")
    submit(cluster, folder, *TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}").wait_for(0)
    return folder / "run"


class Submission:
    """A `python submit/slurm.py` that goes on, in a folder of its own."""

    def __init__(self, cluster, folder, words):
        self.cluster, self.folder = cluster, folder
        command = [sys.executable, str(ROOT / "submit/slurm.py"), *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, status):
        """Return what was printed, after the end with this exit status."""
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == status, output
        return output

    def wait_until(self, found, what, seconds=90):
        """Wait until `found()` holds."""
        until = time.monotonic() + seconds
        while not found():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < until, f"waited for {what}"
            time.sleep(0.2)

    def wait_for_step(self, step):
        file = self.folder / "run/metrics.jsonl"
        self.wait_until(lambda: file.exists() and len(rows(file, "train")) >= step, f"step {step}")

    @property
    def job(self):
        """The number of the job."""
        (folder,) = self.folder.glob("outputs/slurm/*")
        self.wait_until(lambda: list(folder.glob("logs/*_submitted.pkl")), "the job")
        return next(folder.glob("logs/*_submitted.pkl")).name.partition("_")[0]

    def log(self, task=0):
        """The log of a task, empty where there is none yet."""
        return "".join(file.read_text() for file in self.folder.glob(f"outputs/slurm/*/logs/*_{task}_log.out"))

    def end(self):
        """What the job has left of its end."""
        (file,) = self.folder.glob("outputs/slurm/*/end_0.json")
        return json.loads(file.read_text())


def submit(cluster, folder, *words):
    return Submission(cluster, folder, [*words, f"run_dir={folder}/run"])


def ask(cluster, *command):
    return subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True).stdout


def assert_nothing_lost(submission, undisturbed, restarts=1):
    """Every step once, and the weights of the run that nothing disturbed."""
    assert submission.end() == {"status": 0, "restarts": restarts}
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
    stopped = int(re.search(r"stopped at step (\d+) on request", submission.log()).group(1))
    assert f"resumed from {tmp_path}/run/checkpoints/step_{stopped:08d} at step {stopped}" in submission.log()
    for task, node in enumerate(cluster.names):
        assert f"[{node}, task {task}] " in submission.log(task)


def test_a_job_gives_way_to_a_more_important_one(cluster, images, undisturbed, tmp_path):
    words = [*TWO_NODES, "launch.partition=low", *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(150)
    started = time.monotonic()
    ask(cluster, "srun", "--partition=main", "--nodes=2", "--exclusive", "true")
    assert time.monotonic() - started < 30
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)


def test_a_node_that_fails_costs_no_run(cluster, images, undisturbed, tmp_path):
    words = [*TWO_NODES, *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(150)
    cluster.kill_node("n2")
    submission.wait_until(
        lambda: "n2" not in ask(cluster, "squeue", "-h", "-t", "RUNNING", "-o", "%N"), "the end of n2"
    )
    cluster.start_node("n2")
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)


def test_a_time_limit_is_no_end(cluster, images, tmp_path):
    """SLURM's least is a minute; the job is asked to save before, and goes on where it was."""
    words = [*TWO_NODES, "launch.time_min=1", "launch.stop_before_end_sec=40", *TRAINING, f"data.root={images}"]
    submission = submit(cluster, tmp_path, *words, "loop.total_steps=1000000")
    submission.wait_until(lambda: re.search(r"resumed from .* at step (\d+)", submission.log()), "a restart", 200)
    stopped = int(re.search(r"resumed from .* at step (\d+)", submission.log()).group(1))
    submission.wait_for_step(stopped + 20)
    ask(cluster, "scancel", submission.job)
    submission.wait_for(1)
    steps = [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "train")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 20


def test_torchrun_on_each_node(cluster, images, undisturbed, tmp_path):
    """Two ranks of one node, started by its torchrun, are those of two nodes; and it is asked to save too."""
    words = ["launch.gpus_per_node=2", "launch.start=torchrun", "launch.wait=true", *TRAINING, f"data.root={images}"]
    submission = submit(cluster, tmp_path, *words, f"loop.total_steps={STEPS}")
    submission.wait_for_step(150)
    ask(cluster, "scancel", "--signal=USR2", submission.job)
    submission.wait_for(0)
    assert_nothing_lost(submission, undisturbed)
    assert "torch.distributed.run --nnodes=1" in submission.log()
    logs = list(tmp_path.glob(f"outputs/slurm/*/logs/{submission.job}_0_ranks/*/attempt_0/*/stderr.log"))
    assert sorted(log.parent.name for log in logs) == ["0", "0", "1", "1"]  # two starts of two ranks


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


def test_a_sweep_is_one_array(cluster, images, tmp_path):
    """A job that fails does not end the others; the table has them all; the same sweep again runs what is missing."""
    words = ["--multirun", "seed=0,1", "optim.lr=0.01,0.02", "sweep.name=rates", "launch.gpus_per_node=0",
             "launch.wait=true", *(word for word in TRAINING if not word.startswith("optim.lr")), f"data.root={images}",
             "loop.total_steps=4"]  # fmt: skip
    submission = Submission(cluster, tmp_path, words)
    submission.wait_for(0)
    assert len(list(tmp_path.glob("outputs/sweeps/rates/*/complete.json"))) == 4
    table = subprocess.run(
        [sys.executable, "-m", "utils.record.sweep_table", str(tmp_path / "outputs/sweeps/rates")],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert table[0].split()[:3] == ["settings", "runs", "top1"]
    assert sorted(row.split()[0] for row in table[1:]) == ["optim.lr=0.01", "optim.lr=0.02"]
    assert all(row.split()[1] == "2" for row in table[1:])


def test_srun_by_hand_works_without_us(cluster, images, tmp_path):
    command = [sys.executable, str(ROOT / "finetune.py"), *TRAINING, f"data.root={images}", "loop.total_steps=4"]
    said = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=2", *command, f"run_dir={tmp_path}/run"],
        env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "2 ranks x" in said.stderr and "[rank 0 n1] run folder: " in said.stderr
    assert (tmp_path / "run/complete.json").exists()


def test_a_rank_that_is_lost_again_and_again_ends_the_job(cluster, images, tmp_path):
    """max_lost_ranks=0: the loss of the other node's rank is the end; the log names the rank."""
    words = [*TWO_NODES, "launch.max_lost_ranks=0", *TRAINING, f"data.root={images}", f"loop.total_steps={STEPS}"]
    submission = submit(cluster, tmp_path, *words)
    submission.wait_for_step(50)
    cluster.kill_node("n2")
    assert "has ended with status 70, after 0 restarts" in submission.wait_for(70)
    assert "rank 1 has died: no sign of life" in submission.log()
    cluster.start_node("n2")


def test_a_script_that_fails_gives_its_status(cluster, images, tmp_path):
    words = [*TRAINING, f"data.root={images}", "loop.total_steps=20", "init_from=/nowhere", "launch.gpus_per_node=0"]
    submission = submit(cluster, tmp_path, "launch.wait=true", *words)
    assert "has ended with status 2, after 0 restarts" in submission.wait_for(2)
    assert "init_from: " in submission.log() and ask(cluster, "squeue", "-h") == ""


APPTAINER = """\
#!/bin/sh
echo "$@" >> {calls}
shift
while [ "$1" = --bind ]; do shift 2; done
shift
exec "$@"
"""


def test_a_container_has_the_folders_of_the_job(cluster, images, tmp_path, monkeypatch):
    """A stand-in for apptainer notes its words and runs the rest here."""
    stand_in = tmp_path / "bin/apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(APPTAINER.format(calls=tmp_path / "calls"))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    words = ["launch.container=/images/atelier.sif", f"launch.python={sys.executable}", "launch.gpus_per_node=0",
             f'launch.container_mounts=["{images}"]', "launch.wait=true", *TRAINING, f"data.root={images}"]  # fmt: skip
    submit(cluster, tmp_path, *words, "loop.total_steps=4").wait_for(0)
    (folder,) = tmp_path.glob("outputs/slurm/*")
    (call,) = set((tmp_path / "calls").read_text().splitlines())
    binds = f"exec --bind {tmp_path} --bind {folder} --bind {images} /images/atelier.sif {sys.executable} "
    assert call.startswith(binds) and (tmp_path / "run/complete.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optim.lr=-1"],
            "\n  optim.lr: must be greater than or equal to 0, found -1\n",
        ),
        (["optim.lrr=1"], "finetune.py: 1 configuration error\n  optim.lrr: unknown key; close: lr"),
        (["launch.nodes=99"], "finetune.py: loop.global_batch_size: 4 does not divide by the 99 ranks; set it to 99"),
    ],
)
def test_what_the_script_refuses_is_not_queued(cluster, images, tmp_path, words, said):
    output = submit(cluster, tmp_path, *TRAINING, f"data.root={images}", "launch.gpus_per_node=0", *words).wait_for(2)
    assert said in output and "nothing is queued: finetune.py refuses what it was given" in output
    assert not (tmp_path / "outputs/slurm").exists() and ask(cluster, "squeue", "-h") == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["launch.partition=none"],
            r"launch.partition: SLURM refuses the job \('none' was asked for\): .*invalid",
        ),
        (["launch.nodes=99", "loop.global_batch_size=99"], r"launch.nodes: SLURM refuses the job \(99 was asked for\)"),
        (
            ["launch.gpus_per_node=3", "loop.global_batch_size=3"],
            r"launch.(gpus_per_node|nodes): SLURM refuses the job",
        ),
        (["launch.sbatch_lines=[exclude]"], r"launch.sbatch_lines: 'exclude' is no option of sbatch; give --NAME"),
        (['launch.sbatch_lines=["--time=3"]'], r"launch.sbatch_lines: --time is set by another key of launch"),
        (["launch.node=2"], r"launch.node: unknown key; close: nodes"),
    ],
)
def test_a_wrong_field_is_refused(cluster, images, tmp_path, words, said):
    words = [*TRAINING, f"data.root={images}", "loop.total_steps=20", "launch.gpus_per_node=0", *words]
    output = submit(cluster, tmp_path, *words).wait_for(2)
    assert re.search(said, output), output
    assert "Traceback" not in output and ask(cluster, "squeue", "-h") == ""
