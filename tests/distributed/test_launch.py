"""Launching and ending: torchrun's own command, ranks that die, hang or are asked to stop. Properties of whole jobs."""

import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import common, rows, run, start
from utils.io.files import read_json


def wait_for(condition, seconds=90):
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


def endless(collection, run_dir, *more):
    settings = ["loop.total_steps=100000", "loop.batch_size=8", "loop.checkpoint_every_steps=5"]
    return common("classification", collection, run_dir, *settings, *more)


def test_a_rank_that_dies_ends_the_job_and_is_named(collection, tmp_path):
    started = start("finetune.py", endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=16"), tmp_path, 2)
    wait_for(has_rows(tmp_path / "run", 6))
    started.signal(signal.SIGKILL, ranks=[1])
    assert started.wait(120) == [70, -9]
    assert "rank 1 has died: no sign of life" in started.output


def test_a_run_on_one_rank_that_hangs_in_its_data_ends_with_its_worker(collection, tmp_path):
    overrides = endless(collection, tmp_path / "run", "runtime.hang_timeout_sec=6", "runtime.workers=1")
    started = start("tests/tasks/troubled.py", overrides, tmp_path, variables={"TROUBLE": "hang_reading 100"})
    assert started.wait(120) == [70]
    assert re.search(r"rank 0 hangs in 'step \d+: loading': no progress for 6 s", started.output)
    wait_for(has_ended(int(re.search(r"process (\d+) reads for ever", started.output).group(1))), 10)


def test_evaluate_gives_the_figures_of_training_on_any_number_of_ranks(collection, tmp_path):
    settings = ["loop.total_steps=4", "loop.batch_size=6", "loop.micro_batch_size=4", "optim.lr=0.001"]
    settings.append("runtime.channels_last=true")
    said = run("finetune.py", common("classification", collection, tmp_path / "run", *settings), tmp_path, ranks=2)
    assert "Warning" not in said
    trained = rows(tmp_path / "run/metrics.jsonl", "evaluate")[-1]
    tables = []
    for ranks in (1, 3):
        arguments = ["weights=last", "runtime.precision=fp32", "runtime.threads=1", "batch_size=4", "per_image=true"]
        run("evaluate.py", [f"run_dir={tmp_path}/run", *arguments], tmp_path, ranks=ranks)
        found = read_json(tmp_path / "run/metrics_last.json")
        assert found["step"] == 4 and found["samples"] == 15.0
        for name in ("loss", "top1", "top2"):
            assert found[name] == pytest.approx(trained[name], rel=1e-6)
        tables.append(pq.read_table(tmp_path / "run/tables/images_last.parquet"))
    for name, column, other in zip(tables[0].column_names, *tables, strict=True):
        exact = name not in ("loss", "probability", "margin")
        assert len(column) == 15
        assert column == other if exact else column.to_pylist() == pytest.approx(other.to_pylist(), rel=1e-4)
