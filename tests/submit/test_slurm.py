"""submit/slurm.py without a cluster: what goes where on the command line, the sbatch script, the copy of the code, the
jobs of a sweep. Real jobs are in tests/slurm/.
"""

import json
import os
import subprocess
import sys

import pytest

from submit import slurm
from submit.config import LaunchConfig
from submit.executor import make_executor, queue_jobs
from submit.job import ScriptJob
from submit.snapshot import FOLDERS, copy_code
from tests.in_process import compose, configure
from tests.support import ROOT
from utils.config.messages import ConfigError
from utils.errors import UserError


def launch(*words):
    return configure("slurm", [f"launch.{word}" for word in words])[0].launch


def script_of(folder, *words, jobs=1):
    """Return the options and the commands of a sbatch script."""
    lines = make_executor(launch(*words), folder).script_text(jobs).splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return dict(option.partition("=")[::2] for option in options), lines


@pytest.mark.parametrize(
    ("words", "own", "rest"),
    [
        (["launch.nodes=2", "optim.lr=1", "launch=slurm"], ["launch.nodes=2", "launch=slurm"], ["optim.lr=1"]),
        (["--multirun", "a=1,2", "launch.wait=true"], ["launch.wait=true"], ["--multirun", "a=1,2"]),
        (["-m", "data.root=launch.x", "+launch.x=1"], ["+launch.x=1"], ["-m", "data.root=launch.x"]),
        (["--help"], ["--help"], []),
        (["--cfg=job", "launcher=1"], ["--cfg=job"], ["launcher=1"]),
        (["--cfg", "job", "job", "launch.nodes=1"], ["--cfg", "job", "launch.nodes=1"], ["job"]),
    ],
)
def test_words_are_of_launch_or_of_the_script(words, own, rest):
    assert slurm.split_words(words) == (own, rest)


def test_the_script_of_the_default_job(tmp_path):
    options, lines = script_of(tmp_path)
    assert options == {
        "chdir": f"{tmp_path}/code", "gpus-per-node": "1", "job-name": "finetune", "nodes": "1", "ntasks-per-node": "1",
        "open-mode": "append", "output": f"{tmp_path}/logs/%j_0_log.out", "requeue": "", "signal": "USR2@300",
        "time": "1440", "wckey": "submitit",
    }  # fmt: skip
    (command,) = [line for line in lines if line.startswith("srun")]
    assert command.endswith(f"{sys.executable} -u -m submitit.core._submit {tmp_path}/logs")
    assert f"--output {tmp_path}/logs/%j_%t_log.out" in command


def test_every_field_reaches_sbatch(tmp_path):
    options, lines = script_of(
        tmp_path, "nodes=3", "gpus_per_node=8", "partition=long", "account=vision", "qos=high", "constraint=h100",
        "cpus_per_rank=12", "memory_gib=96.5", "time_min=90", "stop_before_end_sec=60", "job_name=mine",
        'sbatch_lines=["--exclude=node7","--exclusive"]', 'setup=["module load cuda"]', "array_parallelism=4",
        "python=/env/bin/python", jobs=6,
    )  # fmt: skip
    wanted = {
        "nodes": "3", "ntasks-per-node": "8", "gpus-per-node": "8", "partition": "long", "account": "vision",
        "qos": "high", "constraint": "h100", "cpus-per-task": "12", "mem": "98816M", "time": "90", "signal": "USR2@60",
        "job-name": "mine", "exclude": "node7", "exclusive": "", "array": "0-5%4",
    }  # fmt: skip
    assert {name: options[name] for name in wanted} == wanted
    assert "module load cuda" in lines and any(" /env/bin/python -u -m submitit" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "tasks", "cpus"),
    [
        (["gpus_per_node=0"], "1", None),
        (["gpus_per_node=0", "ranks_per_node=4", "cpus_per_rank=2"], "4", "2"),
        (["gpus_per_node=4", "start=torchrun", "cpus_per_rank=2"], "1", "8"),
        (["gpus_per_node=4", "ranks_per_node=2"], "2", None),
    ],
)
def test_tasks_and_cpus_of_a_node(words, tasks, cpus, tmp_path):
    options, _ = script_of(tmp_path, *words)
    assert (options["ntasks-per-node"], options.get("cpus-per-task")) == (tasks, cpus)
    assert ("gpus-per-node" in options) == ("gpus_per_node=0" not in words)


def test_containers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = ["container=/images/atelier.sif", 'container_mounts=["/data"]']
    _, lines = script_of(tmp_path / "job", *image)
    binds = f"--bind {tmp_path} --bind {tmp_path}/job --bind /data"
    assert any(f" apptainer exec --nv {binds} /images/atelier.sif python -u -m submitit" in line for line in lines)
    _, lines = script_of(tmp_path / "job", *image, "container_with=pyxis")
    (command,) = [line for line in lines if line.startswith("srun")]
    assert "--container-image=/images/atelier.sif" in command and f"--container-workdir={tmp_path}/job/code" in command
    assert f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/job:{tmp_path}/job,/data:/data" in command


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nodes=0", "launch.nodes: must be greater than or equal to 1, found 0"),
        ("script=finetun", "launch.script: must be 'train', 'pretrain_fcmae', 'finetune'"),
        (
            "sbatch_lines=[exclude]",
            "launch.sbatch_lines: 'exclude' is no option of sbatch; give --NAME or --NAME=VALUE",
        ),
        ('sbatch_lines=["--mem=3G"]', "launch.sbatch_lines: --mem is set by another key of launch; remove it here"),
    ],
)
def test_wrong_values_are_refused(word, said):
    with pytest.raises(ConfigError) as refused:
        launch(word)
    assert refused.value.problems[0].startswith(said)


def test_a_copy_of_the_code_is_complete_and_says_its_commit(tmp_path):
    """It composes without the working tree, and its runs name the commit that it was copied from."""
    copy_code(tmp_path / "code")
    assert {path.name for path in (tmp_path / "code").iterdir() if path.is_dir()} == set(FOLDERS)
    assert not list((tmp_path / "code").rglob("__pycache__"))
    ask = "from utils.record.run_folder import git_state; import json; print(json.dumps(git_state()))"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "code", env={**os.environ, "PYTHONPATH": ""},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert json.loads(found)["commit"] == head


def test_jobs_of_a_sweep_are_those_of_the_script():
    assert slurm.list_jobs(["optim.lr=1"]) == [["optim.lr=1"]]
    words = ["--multirun", "optim.lr=1,2", "sweep.name=rates"]
    assert slurm.list_jobs(words) == [
        [f"optim.lr={rate}", "sweep.name=rates", f"run_dir=outputs/sweeps/rates/optim.lr={rate}"] for rate in (1, 2)
    ]
    with pytest.raises(UserError, match=r"^sweep.trials: a search needs the results of the jobs before"):
        slurm.list_jobs([*words, "sweep.trials=3"])


def test_no_slurm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = ScriptJob("finetune", [], tmp_path, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"^launch: there is no sbatch here; submit on a login node"):
        queue_jobs(launch(), tmp_path, [job])


def test_the_dry_run_of_a_script_sees_the_ranks_of_the_job(tmp_path, monkeypatch, capfd):
    """8 nodes of 8 GPUs: a batch of 100 does not divide; nothing is queued."""
    monkeypatch.chdir(tmp_path)
    own = launch("nodes=8", "gpus_per_node=8")
    with pytest.raises(SystemExit) as refused:
        slurm.check_script(own, ["loop.global_batch_size=100", f"data.root={ROOT}/collections/glyphs"])
    assert refused.value.code == 2
    assert "loop.global_batch_size: 100 does not divide by the 64 ranks" in capfd.readouterr().err


def test_the_schema_has_every_key_and_no_other():
    assert set(compose("slurm")[0]["launch"]) == set(LaunchConfig.model_fields)
