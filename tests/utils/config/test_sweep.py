"""Sweeps: which jobs there are, several at once, GPUs, failures, stopping; with a script of some lines in
place of a training.
"""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from tests.in_process import configure, run_command
from tests.support import refuses
from utils.config.sweep import parse_sweep, run_jobs, write_wandb_sweep
from utils.io.files import read_json

# It writes what a run writes, from its own words; `wait` waits for SIGTERM and ends with status 75.
# With pair=true, jobs 1 and 2 wait for each other.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
values = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(values["run_dir"]); folder.mkdir(parents=True, exist_ok=True)
(folder / "overrides.txt").write_text("\\n".join(sys.argv[1:]) + "\\n")
(folder / "started.json").write_text(json.dumps([time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")]))
(folder / "sweep.txt").write_text(os.environ.get("WANDB_RUN_GROUP", ""))
if values.get("top") == "bad":
    sys.exit(3)
if values.get("top") == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if values.get("top") == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
late = time.time() + 30
while "pair" in values and values["top"] in "12" and len(list(folder.parent.glob("top=[12]/started.json"))) < 2:
    assert time.time() < late
    time.sleep(0.01)
top = float(values.get("top", 0))
(folder / "result.json").write_text(json.dumps({"metric": "m", "value": -(top - 3) ** 2, "is_lowest_best": False}))
(folder / "ended.json").write_text(json.dumps(time.time()))
(folder / "complete.json").write_text("{}")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def run(script, *words):
    """Return {job: status}."""
    sweep = parse_sweep(["--multirun", *words])
    return {Path(job.folder).name: status for job, status in run_jobs(sweep.jobs(), sweep.settings, script).items()}


def started(name):
    """Return {job: (when, GPU)}."""
    return {file.parent.name: read_json(file) for file in Path("outputs/sweeps").glob(f"{name}/*/started.json")}


def test_jobs_are_all_choices_with_each_other():
    jobs = list(parse_sweep(["-m", "a=1,2", "b=x", "seed=range(0,2)", "sweep.name=n"]).jobs())
    assert [" ".join(job.words) for job in jobs] == [
        f"a={a} b=x seed={seed} sweep.name=n run_dir=outputs/sweeps/n/a={a},seed={seed}"
        for a in (1, 2)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    "words, names",
    [
        (["b.x=range(1,3)", "+a.y=choice(u,v)", "run_dir=here"], ["x=1,y=u", "x=1,y=v", "x=2,y=u", "x=2,y=v"]),
        (["model.name=a,b", "data.name=c,d"], [f"data.name={d},model.name={m}" for m in "ab" for d in "cd"]),
        (["seed=1,2", "data.seed=3"], ["seed=1", "seed=2"]),
        (["init_from='run','x y'"], ["init_from=run", "init_from=x_y-HASH"]),
        (["seed=1", "sweep.name=first"], ["job"]),
    ],
)
def test_a_job_is_named_by_what_is_swept(words, names):
    sweep = parse_sweep(["-m", *words])
    assert [re.sub(r"-\w{8}$", "-HASH", Path(job.folder).name) for job in sweep.jobs()] == names
    again = parse_sweep(["-m", *reversed(words)])
    assert {job.folder for job in again.jobs()} == {job.folder for job in sweep.jobs()}


def test_jobs_run_at_once_on_the_gpus_given_and_know_their_sweep(script):
    assert set(run(script, "top=1,2,3,4", "pair=true", "sweep.name=g", "sweep.gpus=[4,6]").values()) == {0}
    found = started("g")
    assert len(found) == 4 and {gpu for _, gpu in found.values()} == {"4", "6"}
    assert {file.read_text() for file in Path("outputs/sweeps").glob("*/*/sweep.txt")} == {"g"}


def test_what_is_missing_runs_again_and_a_job_that_fails_or_is_killed_does_not_end_the_others(script):
    words = ["sweep.name=f", "sweep.gpus=[0,0]", "n=4"]
    assert run(script, "top=1,bad,killed,2", *words) == {"top=1": 0, "top=bad": 3, "top=killed": 128 + 9, "top=2": 0}
    before = started("f")
    assert run(script, "top=1,bad,2,4", *words) == {"top=1": 0, "top=bad": 3, "top=2": 0, "top=4": 0}
    after = started("f")
    assert {job for job in after if after[job] != before.get(job)} == {"top=bad", "top=4"}
    run(script, "top=1", "sweep.name=f", "n=8")  # with other constants: the run itself refuses or continues
    assert started("f")["top=1"] == before["top=1"] and started("f")["job"]


def test_a_stop_signal_is_passed_on_and_no_job_is_started_then(script):
    def stop():
        while "top=wait" not in started("s"):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        run(script, "top=wait,1,2", "sweep.name=s", "sweep.gpus=[0]")
    thread.join()
    assert stopped.value.code == 75 and list(started("s")) == ["top=wait"]


def test_a_range_and_jobs_on_gpus_under_a_launcher_are_refused(script, monkeypatch):
    with refuses("^optim.lr: .*sweep.wandb"):
        run(script, "optim.lr=interval(0,1)")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses("^sweep.gpus: "):
        run(script, "top=1,2", "sweep.gpus=[0]")


def test_a_folder_that_cannot_be_made_is_named(script, tmp_path):
    (tmp_path / "file").touch()
    with refuses(r"^run_dir: .*file/rates cannot be written"):
        run(script, "top=1,2", f"run_dir={tmp_path}/file/rates")


def test_a_sweep_is_a_file_whose_commands_wandbs_agent_makes(tmp_path, monkeypatch, capsys):
    words = [
        "--multirun",
        "optim.lr=0.001,0.003",
        "augment.image_size_hw=[32,32],[64,64]",
        "seed=4",
        "sweep.wandb=sweep.yaml",
    ]
    assert run_command("finetune", [*words, "run_dir=x", "tracking=jsonl"], tmp_path, monkeypatch) == 0
    assert "wandb sweep sweep.yaml" in capsys.readouterr().err
    sweep = load_sweep_config(str(tmp_path / "sweep.yaml"))
    assert (sweep["program"], sweep["method"]) == ("finetune.py", "grid")
    args = create_sweep_command_args(
        {"args": {name: {"value": part["values"][1]} for name, part in sweep["parameters"].items()}}
    )
    config, _ = configure("finetune", (create_sweep_command(sweep["command"])[3:-1] + args[sweep["command"][-1][2:-1]]))
    assert (config.optim.lr, config.augment.image_size_hw, config.seed, config.tracking.name) == (
        0.003,
        [64, 64],
        4,
        "wandb",
    )


def test_ranges_are_searched_by_wandb(tmp_path):
    words = ["optim.lr=tag(log,interval(1e-4,1e-2))", "loop.batch_size=tag(int,interval(4,8))"]
    write_wandb_sweep(parse_sweep([*words, f"sweep.wandb={tmp_path}/s.yaml"]), "train.py")
    sweep = load_sweep_config(f"{tmp_path}/s.yaml")
    assert (sweep["method"], sweep["metric"]["goal"]) == ("bayes", "maximize")
    ranges = {"optim.lr": ("log_uniform_values", 1e-4, 1e-2), "loop.batch_size": (4, 8)}
    assert {name: tuple(part.values()) for name, part in sweep["parameters"].items()} == ranges
