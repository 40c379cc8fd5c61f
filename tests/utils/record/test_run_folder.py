"""The run folder. What it holds, that one run at a time writes to it, and messages where it cannot be used."""

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.in_process import working_in
from utils.config.entry_point import ROOT, Job
from utils.config.sweep import SWEEP_VARIABLE
from utils.errors import UserError
from utils.io.files import read_json
from utils.record.logging import get_logger, setup_logging
from utils.record.run_config import read_run_config
from utils.record.run_folder import (
    default_run_dir,
    environment_state,
    git_state,
    open_run_folder,
    sweep_of,
    update_saved_config,
)

JOB = Job("finetune", {"model": "convnextv2_tiny", "data": "image_folder"}, ["seed=1", "optim.lr=0.1"])


def test_a_run_knows_its_sweep_in_turn_and_as_a_command_of_its_own(monkeypatch):
    monkeypatch.delenv(SWEEP_VARIABLE, raising=False)
    job = Job("finetune", {}, [], "seed=1")
    assert sweep_of(Path("outputs/sweeps/rates/seed=1"), job) == "rates"
    assert sweep_of(Path("outputs/first"), JOB) is None
    monkeypatch.setenv(SWEEP_VARIABLE, "rates")
    assert sweep_of(Path("anywhere"), JOB) == "rates"


def config_for(path, **more):
    return {"run_dir": str(path), "sweep": {"name": "first"}, "model": {"name": "m"}, "data": {"name": "d"}, **more}


@pytest.fixture(autouse=True)
def fresh_logging(tmp_path):
    with working_in(tmp_path):
        setup_logging()
        yield


def test_what_a_new_folder_holds(tmp_path):
    get_logger("before").info("said before")
    with open_run_folder(config_for(tmp_path / "a/run", seed=1), JOB, {"torch": "x"}) as folder:
        get_logger("during").warning("said during")
        assert (folder.checkpoints, folder.weights, folder.plots) == tuple(
            folder.path / name for name in ("checkpoints", "weights", "plots")
        )
        assert all(path.is_dir() for path in (folder.checkpoints, folder.weights, folder.plots))
    get_logger("after").info("said after")
    assert read_json(folder.path / "config.json") == {"script": "finetune", **config_for(tmp_path / "a/run", seed=1)}
    assert read_json(folder.path / "environment.json") == {"torch": "x"}
    assert (folder.path / "overrides.txt").read_text() == "seed=1\noptim.lr=0.1\n"
    said = (folder.path / "log.txt").read_text()
    assert "INFO said before" in said and "WARNING said during" in said and "after" not in said
    assert not [
        handler for handler in logging.getLogger("atelier").handlers if isinstance(handler, logging.FileHandler)
    ]


def test_the_first_configuration_stays_until_a_resumption_is_accepted(tmp_path):
    for seed in (1, 2):
        with open_run_folder(config_for(tmp_path, seed=seed), JOB, {"seed": seed}):
            pass
    assert read_json(tmp_path / "config.json")["seed"] == 1 and read_json(tmp_path / "environment.json") == {"seed": 1}
    update_saved_config(tmp_path, config_for(tmp_path, seed=2), JOB)
    assert read_run_config(tmp_path)["seed"] == 2 and read_run_config(tmp_path)["script"] == "finetune"
    assert read_json(tmp_path / "config.before_resume.json")["seed"] == 1


def test_a_configuration_that_the_disk_refuses_leaves_the_saved_one(tmp_path, monkeypatch):
    with open_run_folder(config_for(tmp_path, seed=1), JOB, {}):
        pass

    def refuse(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.record.run_folder.write_json", refuse)
    with pytest.raises(UserError, match=r"^run_dir: .*config.json cannot be written \(No space left on device\); make"):
        update_saved_config(tmp_path, config_for(tmp_path, seed=2), JOB)
    assert read_json(tmp_path / "config.json")["seed"] == 1


def refusal(config, job=JOB):
    """What is said where the folder cannot be opened."""
    with pytest.raises(UserError) as refused, open_run_folder(config, job, {}):
        pass
    return str(refused.value)


def test_a_second_run_is_refused_while_the_first_one_holds_the_folder(tmp_path):
    with open_run_folder(config_for(tmp_path), JOB, {}):
        assert refusal(config_for(tmp_path, seed=2), Job("x", {}, ["other"])) == (
            f"run_dir: another run is writing to {tmp_path}; wait for it or give another run_dir"
        )
        assert "seed" not in read_json(tmp_path / "config.json")
        assert (tmp_path / "overrides.txt").read_text() == "seed=1\noptim.lr=0.1\n"
    with open_run_folder(config_for(tmp_path), JOB, {}):
        pass


def test_a_requeued_job_waits_for_the_processes_of_its_start_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with ExitStack() as first:
        first.enter_context(open_run_folder(config_for(tmp_path), JOB, {}))
        release = threading.Timer(1.5, first.close)
        release.start()
        with open_run_folder(config_for(tmp_path), JOB, {}):
            assert not release.is_alive()
    monkeypatch.setattr("utils.record.run_folder._REQUEUED_SEC", 0.5)
    with open_run_folder(config_for(tmp_path), JOB, {}):
        assert "another run is writing" in refusal(config_for(tmp_path))


def test_the_kernel_lets_go_of_a_killed_run_s_folder(tmp_path):
    code = (
        "import fcntl, os, sys, signal; stream = open(sys.argv[1] + '/.lock', 'a+');"
        "fcntl.flock(stream, fcntl.LOCK_EX); print('held', flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert "another run is writing" in refusal(config_for(tmp_path))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with open_run_folder(config_for(tmp_path), JOB, {}):
        pass


def test_the_folder_is_let_go_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), open_run_folder(config_for(tmp_path), JOB, {}):
            raise ZeroDivisionError


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    reason = "File exists" if name == "file" else "Not a directory"
    message = f"run_dir: {tmp_path / name} cannot be written ({reason}); give another run_dir"
    assert refusal(config_for(tmp_path / name)) == message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; its sibling below makes the error itself")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in refusal(config_for(tmp_path / "run"))


def test_a_disk_that_takes_no_more_is_named(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.record.run_folder.write_json", full)
    message = f"run_dir: {tmp_path} cannot be written (No space left on device); give another run_dir"
    assert refusal(config_for(tmp_path)) == message


def test_a_log_that_the_disk_refuses_hides_no_error(tmp_path, monkeypatch, capsys):
    """Neither while it is written nor when it is closed; and what was to be written is not shown either."""
    monkeypatch.setattr("utils.record.run_folder.set_aside", lambda path, why: None)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    for _ in range(2):  # the folder is let go of
        setup_logging()
        with pytest.raises(UserError, match="^the mistake$"), open_run_folder(config_for(tmp_path), JOB, {}):
            get_logger("during").warning("password=%s", "a-secret-of-mine")
            raise UserError("the mistake")
        said = capsys.readouterr().err
        assert said.count("log.txt cannot be written (No space left on device)") == 1
        assert "password=***" in said and "a-secret" not in said
        assert "Traceback" not in said and "Logging error" not in said


@pytest.mark.parametrize(
    ("job", "run_dir", "expected"),
    [
        (JOB, "x/y", "x/y"),
        (Job("finetune", {}, [], "seed=1"), None, "outputs/sweeps/first/seed=1"),
        (Job("finetune", {}, [], "seed=1"), "x", "x/seed=1"),
    ],
)
def test_where_a_run_lies(job, run_dir, expected):
    assert default_run_dir({**config_for("x"), "run_dir": run_dir}, job) == expected


def test_a_default_folder_is_named_by_script_model_data_and_recipe():
    values = {**config_for("x"), "run_dir": None}
    folder, _, digits = default_run_dir(values, JOB).rpartition("-")
    assert folder == "outputs/finetune/convnextv2_tiny-image_folder" and len(digits) == 8
    assert default_run_dir(values, Job("finetune", {}, [])).startswith("outputs/finetune/m-d-")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^run_dir: .* is not a run folder: it has no config.json; name a folder that tra"
    ):
        read_run_config(tmp_path)


def test_a_damaged_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"script": ')
    with pytest.raises(UserError, match=r"^run_dir: .*config.json is damaged \(Expecting value"):
        read_run_config(tmp_path)


def test_the_environment_says_what_ran(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/finetune.py", "seed=1"])
    state = environment_state(runtime="device=cpu")
    json.dumps(state, allow_nan=False)
    assert state["command"] == ["finetune.py", "seed=1"] and state["runtime"] == "device=cpu"
    versions = {"python", "torch", "torchvision", "numpy", "pillow", "simplejpeg"}
    assert versions | {"threads", "world_size", "git"} <= set(state)


def test_the_state_of_git_is_null_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.record.run_folder.ROOT", Path(tempfile.gettempdir()))
    assert git_state() == {"commit": None, "changed_files": None}
    monkeypatch.setattr("utils.record.run_folder.ROOT", ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert git_state() == {"commit": None, "changed_files": None}


@pytest.mark.parametrize(
    ("environment", "rank", "place"),
    [
        ({}, 0, ""),
        ({}, 3, "[rank 3] "),
        ({"SLURMD_NODENAME": "n2", "SLURM_STEP_NUM_TASKS": "1"}, 0, ""),
        ({"SLURMD_NODENAME": "n2", "SLURM_STEP_NUM_TASKS": "4"}, 0, "[rank 0 n2] "),
        ({"SLURMD_NODENAME": "n2", "SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "2"}, 1, "[rank 1 n2] "),
    ],
)
def test_lines_of_a_job_of_several_ranks_begin_with_rank_and_node(environment, rank, place, monkeypatch, capsys):
    for name in ("SLURMD_NODENAME", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    setup_logging(rank)
    get_logger("a").warning("two\nlines")
    assert capsys.readouterr().err == f"{place}two\n{place}lines\n"
