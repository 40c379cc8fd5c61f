"""The run folder: what it holds, that one run at a time writes to it, what is refused, and how it is read."""

import errno
import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.in_process import working_in
from tests.support import refuses
from utils.config.entry_point import Job
from utils.errors import UserError
from utils.io.files import read_json
from utils.record.logging import log, setup_logging
from utils.record.run_folder import environment_state, git_state, open_run_folder, write_config
from utils.record.run_reader import RunReader

JOB = Job("finetune", {"model": "convnextv2_tiny", "data": "image_folder"}, ["seed=1", "optim.lr=0.1"])


def config_for(path, **more):
    return {"run_dir": str(path), "sweep": {"name": "first"}, "model": {"name": "m"}, "data": {"name": "d"}, **more}


def open_folder(config):
    return open_run_folder(Path(config["run_dir"]), config, JOB)


@pytest.fixture(autouse=True)
def fresh_logging(tmp_path):
    with working_in(tmp_path):
        setup_logging()
        yield


def test_what_a_folder_holds_and_what_a_resumption_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ATELIER_RUN_NOTE", str(tmp_path / "job/run_dir"))
    log.info("said before")
    with open_folder(config_for(tmp_path / "a/run", seed=1)) as folder:
        write_config(folder, {"torch": "x"})
        log.warning("said during")
        assert all((folder.path / name).is_dir() for name in ("checkpoints", "weights", "plots"))
        assert RunReader(folder.path).state == "running"
    assert (tmp_path / "job/run_dir").read_text() == str(folder.path.absolute())
    log.info("said after")
    run = RunReader(folder.path)
    assert read_json(folder.path / "config.json") == {"script": "finetune", **config_for(tmp_path / "a/run", seed=1)}
    assert run.state == "stopped"
    assert (folder.path / "overrides.txt").read_text() == "seed=1\noptim.lr=0.1\n"
    said = (folder.path / "log.txt").read_text()
    assert "INFO said before" in said and "WARNING said during" in said and "after" not in said
    with open_folder(config_for(folder.path, seed=2)) as folder:
        assert run.config["seed"] == 1
        write_config(folder, {"torch": "y"})
    assert run.config["seed"] == 2 and read_json(folder.path / "environment.json") == {"torch": "x"}


def refusal(config):
    with pytest.raises(UserError) as refused, open_folder(config):
        pass
    return str(refused.value)


def test_a_second_run_is_refused_while_the_first_one_holds_the_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), open_folder(config_for(tmp_path)):
            assert f"another run is writing to {tmp_path}" in refusal(config_for(tmp_path, seed=2))
            raise ZeroDivisionError


def test_a_requeued_job_waits_for_the_processes_of_its_start_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with ExitStack() as first:
        first.enter_context(open_folder(config_for(tmp_path)))
        release = threading.Timer(1.5, first.close)
        release.start()
        with open_folder(config_for(tmp_path)):
            assert not release.is_alive()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert refusal(config_for(tmp_path / "file/below")).startswith(f"run_dir: {tmp_path}/file/below cannot be written")

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.record.run_folder.write_json", full)
    with refuses("run_dir: .*No space left"), open_folder(config_for("x")) as folder:
        write_config(folder, {})


@pytest.mark.parametrize("name", ["plots", "tables", "weights", "log.txt"])
def test_a_link_out_of_the_folder_is_refused_by_name(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/inner").mkdir(parents=True)
    (tmp_path / "run/link").symlink_to("inner")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert refusal(config_for(tmp_path / "run")).startswith(f"run_dir: {tmp_path}/run/{name} is a link out")
    assert not any((tmp_path / "elsewhere").iterdir())
    (tmp_path / "run" / name).unlink()
    with open_folder(config_for(tmp_path / "run")):
        pass


def test_a_log_that_the_disk_refuses_hides_no_error(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    for _ in range(2):  # the folder is let go of
        setup_logging()
        with refuses("^the mistake$"), open_folder(config_for(tmp_path)):
            log.warning("password=%s", "a-secret-of-mine")
            raise UserError("the mistake")
        said = capsys.readouterr().err
        assert said.count("log.txt cannot be written (No space left on device)") == 1
        assert "password=***" in said and "a-secret" not in said
        assert "Traceback" not in said and "Logging error" not in said


def test_a_folder_that_is_no_run_and_a_damaged_configuration_are_refused(tmp_path):
    with refuses(r"^run_dir: .* is not a run folder"):
        _ = RunReader(tmp_path).config
    for text in ('{"seed": NaN}', '{"seed": 1', "[]"):
        (tmp_path / "config.json").write_text(text)
        with refuses(r"^run_dir: .*config\.json is not a readable JSON file"):
            _ = RunReader(tmp_path).config


def test_the_environment_says_what_ran(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/x/finetune.py", "seed=1"])
    state = environment_state(runtime="device=cpu")
    json.dumps(state, allow_nan=False)
    assert state["command"] == ["finetune.py", "seed=1"] and state["runtime"] == "device=cpu"
    assert {"python", "torch", "numpy", "pillow", "simplejpeg", "threads", "world_size", "git"} <= set(state)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert git_state.__wrapped__() == {"commit": None, "changed_files": None}
