"""torchrun itself: a signal to a whole job."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.distributed.test_launch import has_ended, has_rows, processes, wait_for
from tests.support import ROOT, common, logged, rows, run


def test_a_signal_to_torchrun_and_its_ranks_saves_and_the_same_command_continues(collection, tmp_path):
    """As srun, systemd and cgroups do it; SIGUSR1 ends torchrun with its store, SIGTERM it passes on.

    The save lasts longer than the watchdog waits for a store.
    """
    settings = ["loop.total_steps=100", "loop.batch_size=8", "loop.evaluate_every_epochs=100"]
    overrides = common("classification", collection, tmp_path / "run", *settings, "runtime.hang_timeout_sec=16")
    script, output = ROOT / "tests/tasks/troubled.py", tmp_path / "output.txt"
    with open(output, "wb") as stream:
        agent = subprocess.Popen(
            [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", script, *overrides],
            cwd=tmp_path, env={**os.environ, "TROUBLE": "slow_save 2.5"}, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    wait_for(has_rows(tmp_path / "run", 10))
    ranks = [pid for pid, (parent, _) in processes().items() if parent == agent.pid]
    for pid in (agent.pid, *ranks):  # torchrun gives each rank a session of its own
        os.killpg(pid, signal.SIGUSR1)
    assert agent.wait(60) != 0
    wait_for(has_ended(*ranks))
    said = output.read_text()
    assert len(ranks) == 2 and said.count("SIGUSR1: finishing the step, then saving") == 2
    assert "leaving at once" not in said and "rank 0 is gone" not in said
    stopped = int(rows(tmp_path / "run/metrics.jsonl")[-1]["step"])
    assert (tmp_path / f"run/checkpoints/step_{stopped:08d}").is_dir() and stopped < 100
    assert f"at step {stopped}" in run("finetune.py", overrides, tmp_path, ranks=2)
    assert logged(tmp_path / "run", "train", "step") == list(range(1, 101))
