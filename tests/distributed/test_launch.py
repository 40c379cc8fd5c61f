"""Launching and ending: torchrun's own command, ranks that die, hang or are asked to stop. Properties of whole jobs."""

import json
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import checkpoint_tensors, common, free_port, rows, run, start


def wait_for(condition, seconds=90):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def has_rows(run_dir, count):
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= count


def processes():
    """Return the parent and the state of each process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(path.parent.name)] = (int(parent), state)
    return found


def has_ended(*pids):
    """Return a function that says whether processes are gone, or ended and not yet waited for."""
    return lambda: all(processes().get(pid, (0, "Z"))[1] == "Z" for pid in pids)


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(collection, tmp_path):
    overrides = common("classification", collection, tmp_path / "run", "loop.global_batch_size=8")
    printed = run("finetune.py", overrides, tmp_path, ranks=3, expect=2)
    refused = "loop.global_batch_size: 8 does not divide by the 3 ranks; set it to 6, 9"
    lines = [line for line in printed.splitlines() if refused in line]
    assert sorted(line.split("finetune.py")[0] for line in lines) == ["", "[rank 1] ", "[rank 2] "]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def endless(collection, run_dir, *more):
    settings = ["loop.total_steps=100000", "loop.global_batch_size=8", "loop.checkpoint_every_steps=5"]
    return common("classification", collection, run_dir, *settings, *more)


def test_a_rank_that_dies_ends_the_job_and_is_named(collection, tmp_path):
    started = start("finetune.py", endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=16"), tmp_path, 2)
    wait_for(has_rows(tmp_path / "run", 6))
    started.signal(signal.SIGKILL, ranks=[1])
    codes = started.wait(120)
    assert codes == [70, -9]
    assert "rank 1 has died: no sign of life" in started.output


def test_a_run_on_one_rank_that_hangs_in_its_data_ends_with_its_worker(collection, tmp_path):
    overrides = endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=6", "runtime.workers=1")
    started = start("tests/tasks/troubled.py", overrides, tmp_path, variables={"TROUBLE": "hang_reading 30"})
    assert started.wait(120) == [70]
    assert "rank 0 hangs in 'step 3: loading': no progress for 6 s" in started.output
    worker = int(re.search(r"process (\d+) reads for ever", started.output).group(1))
    wait_for(has_ended(worker), 10)


def test_slurm_variables_start_the_same_job(collection, tmp_path):
    """Two tasks of one step, told so by SLURM's variables alone."""
    port = free_port()
    started = []
    for rank in range(2):
        variables = {
            "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": 77,
            "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        overrides = common(
            "classification", collection, tmp_path / "run", "loop.total_steps=3", "loop.global_batch_size=8"
        )
        started.append(
            start("finetune.py", overrides, tmp_path, variables={name: str(value) for name, value in variables.items()})
        )
    assert [job.wait() for job in started] == [[0], [0]]
    assert "2 ranks, each CPU" in started[0].output
    assert checkpoint_tensors(tmp_path / "run", 3)


def test_evaluate_gives_the_figures_of_training_on_any_number_of_ranks(collection, tmp_path):
    settings = ["loop.total_steps=4", "loop.global_batch_size=6", "loop.batch_size=4", "optim.lr=0.001"]
    run("finetune.py", common("classification", collection, tmp_path / "run", *settings), tmp_path)
    trained = rows(tmp_path / "run/metrics.jsonl", "evaluate")[-1]
    tables = []
    for ranks in (1, 3):
        arguments = ["weights=last", "runtime.precision=fp32", "runtime.threads=1", "batch_size=4", "per_image=true"]
        run("evaluate.py", [f"run_dir={tmp_path}/run", *arguments], tmp_path, ranks=ranks)
        found = json.loads((tmp_path / "run/metrics.json").read_text())
        assert found["step"] == 4 and found["samples"] == 15.0
        for name in ("loss", "top1", "top3"):
            assert found[name] == pytest.approx(trained[name], rel=1e-6)
        tables.append(pq.read_table(tmp_path / "run/tables/images.parquet"))
    for name, column, other in zip(tables[0].column_names, *tables, strict=True):
        exact = name not in ("loss", "probability", "margin")
        assert len(column) == 15
        assert column == other if exact else column.to_pylist() == pytest.approx(other.to_pylist(), rel=1e-4)
