"""What the tests of jobs share: a tiny training, and its submission."""

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.in_process import SMALL_MODEL
from tests.support import ROOT, rows
from utils.io.files import read_json

TRAINING = [
    *SMALL_MODEL, "augment.image_size_hw=[16,16]", "loop.batch_size=4", "loop.micro_batch_size=2", "runtime=reference",
    "runtime.device=cpu", "runtime.threads=1", "loop.log_every_steps=1", "loop.evaluate_every_epochs=1000",
    "loop.checkpoint_every_steps=100", "data=image_folder", "optim.lr=0.01",
]  # fmt: skip
TWO_NODES = ["launch.nodes=2", "launch.gpus_per_node=0"]
WAIT_SEC = 600  # for what comes within seconds on an idle machine: beside other tests, a start alone takes minutes


class Submission:
    """What `python submit/slurm.py` has queued from a folder; `said` is what it printed."""

    def __init__(self, cluster, folder, words, status=0):
        self.cluster, self.place = cluster, folder
        done = subprocess.run(
            [sys.executable, str(ROOT / "submit/slurm.py"), *words], cwd=folder, env=cluster.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=WAIT_SEC,
        )  # fmt: skip
        self.said = done.stdout
        assert done.returncode == status, self.said
        queued = re.search(r"job (\d+): \w+\.py in (.+?);", self.said)
        self.job, self.folder = (queued[1], Path(queued[2])) if queued else (None, None)

    @property
    def ends(self):
        """The statuses of the jobs that have ended, by their index in the array, and their restarts."""
        found = {int(file.stem[4:]): read_json(file) for file in self.folder.glob("end_*.json")}
        return {index: (end["status"], end["restarts"]) for index, end in sorted(found.items())}

    def wait_for(self, *ends):
        """Wait for the end of the jobs, each with (status, restarts)."""
        wait_until(lambda: len(self.ends) == len(ends), f"the end:\n{self.story()}")
        assert list(self.ends.values()) == list(ends), self.story()

    def story(self):
        """What a failed test shows: the tasks' logs without their steps, and what SLURM's controller did."""
        logs = [file.read_text() for file in sorted(self.folder.glob("logs/*_log.out"))]
        lines = [line for log in logs for line in log.splitlines() if "train loss" not in line]
        return "\n".join([*lines, (self.cluster.folder / "log/slurmctld.log").read_text()])

    def wait_until(self, found, what):
        def is_there():
            there = found()
            assert there or not self.ends, self.story()
            return there

        wait_until(is_there, what)

    def wait_for_step(self, step):
        file = self.place / "run/metrics.jsonl"
        self.wait_until(lambda: file.exists() and len(rows(file, "train")) >= step, f"step {step}")

    def log(self, task=0):
        """The log of a task, empty where there is none yet."""
        return "".join(file.read_text() for file in self.folder.glob(f"logs/*_{task}_log.out"))


def wait_until(found, what):
    until = time.monotonic() + WAIT_SEC
    while not found():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.2)


def submit(cluster, folder, *words):
    return Submission(cluster, folder, [*words, f"run_dir={folder}/run"])


def ask(cluster, *command):
    return subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True).stdout
