"""Launching and ending, slow: torchrun itself, many ranks, signals to a whole job."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_launch import endless, has_ended, has_rows, processes, wait_for
from tests.support import ROOT, common, rows, run, start


def test_more_ranks_than_divide_the_validation_set_end_cleanly(collection, tmp_path):
    """A successful job ends with status 0, twice (gloo aborts at exit now and then if it is let)."""
    for number in range(2):
        overrides = common(
            "classification", collection, tmp_path / f"{number}", "loop.total_steps=1", "loop.global_batch_size=4"
        )
        run("finetune.py", overrides, tmp_path, ranks=4)


def test_a_rank_that_stops_is_named_and_ends_the_job(collection, tmp_path):
    started = start("finetune.py", endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=6"), tmp_path, 2)
    wait_for(has_rows(tmp_path / "run", 6))
    started.signal(signal.SIGSTOP, ranks=[1])
    started.processes[0].join(60)
    assert started.processes[0].exitcode == 70
    assert "rank 1 has died or was stopped: no sign of life" in started.output
    started.signal(signal.SIGKILL)


def test_a_rank_that_hangs_in_its_data_is_named_with_its_place(collection, tmp_path):
    """A sleeping loader is alive but makes no progress."""
    overrides = endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=6")
    started = start("tests/tasks/troubled.py", overrides, tmp_path, 2, variables={"TROUBLE": "hang_loading 1 4"})
    codes = started.wait(120)
    assert codes[0] == 70
    assert "rank 1 hangs in 'step 3: loading': no progress for 6 s" in started.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_and_its_ranks_saves_and_the_same_command_continues(number, collection, tmp_path):
    """As srun, systemd and cgroups do it: each rank gets SIGTERM twice, and SIGUSR1 ends torchrun with its store.

    The save lasts longer than the watchdog waits for a store.
    """
    settings = ["loop.total_steps=200", "loop.global_batch_size=8", "loop.evaluate_every_epochs=100"]
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
        os.killpg(pid, number)
    assert agent.wait(60) != 0
    wait_for(has_ended(*ranks))
    said = output.read_text()
    assert len(ranks) == 2 and said.count(f"{number.name}: finishing the step, then saving") == 2
    assert "leaving at once" not in said and "rank 0 is gone" not in said
    stopped = int(rows(tmp_path / "run/metrics.jsonl")[-1]["step"])
    assert (tmp_path / f"run/checkpoints/step_{stopped:08d}").is_dir() and stopped < 200
    assert f"at step {stopped}" in run("finetune.py", overrides, tmp_path, ranks=2)
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "train")] == list(range(1, 201))
