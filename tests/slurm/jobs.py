"""What the tests of jobs share: a tiny training, and a submission that goes on while a test disturbs it."""

import json
import subprocess
import sys
import time

from tests.in_process import SMALL_MODEL
from tests.support import ROOT, rows

TRAINING = [
    *SMALL_MODEL, "augment.image_size_hw=[16,16]", "loop.batch_size=4", "loop.micro_batch_size=2", "runtime=reference",
    "runtime.device=cpu", "runtime.threads=1", "loop.log_every_steps=1", "loop.evaluate_every_epochs=1000",
    "loop.checkpoint_every_steps=100", "data=image_folder", "optim.lr=0.01",
]  # fmt: skip
TWO_NODES = ["launch.nodes=2", "launch.gpus_per_node=0", "launch.wait=true"]


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
        assert self.process.returncode == status, f"{output}\n{self.story()}"
        return output

    def story(self):
        """What a failed test shows: the tasks' logs without their steps, and what SLURM's controller did."""
        logs = [file.read_text() for file in sorted(self.folder.glob("outputs/slurm/*/logs/*_log.out"))]
        lines = [line for log in logs for line in log.splitlines() if "train loss" not in line]
        return "\n".join([*lines, (self.cluster.folder / "log/slurmctld.log").read_text()])

    def wait_until(self, found, what, seconds=90):
        """Wait until `found()` holds, while the submission goes on."""

        def is_there():
            there = found()
            assert there or self.process.poll() is None, f"{self.process.communicate()[0]}\n{self.story()}"
            return there

        wait_until(is_there, what, seconds)

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

    def assert_ended(self, status, restarts):
        """Assert what the job has left of its end."""
        (file,) = self.folder.glob("outputs/slurm/*/end_0.json")
        end = json.loads(file.read_text())
        assert end == {"status": status, "restarts": restarts}, f"{end}\n{self.story()}"


def wait_until(found, what, seconds=90):
    """Wait until `found()` holds."""
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.2)


def submit(cluster, folder, *words):
    return Submission(cluster, folder, [*words, f"run_dir={folder}/run"])


def ask(cluster, *command):
    return subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True).stdout
