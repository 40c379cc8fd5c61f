"""submit/slurm.py without a cluster: what goes where on the command line, the sbatch script, the copy of the code, the
jobs of a sweep, the end of a job. Real jobs are in tests/slurm/.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from submit import slurm
from submit.job import NoAnswer, ScriptJob, finish
from submit.slurm import FOLDERS, clean_environment, copy_code, queue_jobs, script_text
from tests.in_process import TINY, configure, run_command
from tests.support import ROOT, refuses, set_variables
from utils.config.messages import ConfigError
from utils.io.files import read_json, write_json, write_text
from utils.record.run_reader import RunReader, write_progress


def launch(*words):
    return configure("slurm", [f"launch.{word}" for word in words])[0].launch


def script_of(folder, *words, jobs=1):
    """Return the options and the commands of a sbatch script."""
    lines = script_text(launch(*words), folder, jobs).splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return dict(option.partition("=")[::2] for option in options), lines


@pytest.mark.parametrize(
    "words, own, rest",
    [
        (["launch.nodes=2", "optim.lr=1", "launch=slurm"], ["launch.nodes=2", "launch=slurm"], ["optim.lr=1"]),
        (["-m", "data.root=launch.x", "+launch.x=1"], ["+launch.x=1"], ["-m", "data.root=launch.x"]),
        (["--help"], ["--help"], []),
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
        "time": "1440",
    }  # fmt: skip
    (command,) = [line for line in lines if line.startswith("srun")]
    assert command.endswith(f"{sys.executable} -u -m submitit.core._submit {tmp_path}/logs")
    assert f"--output {tmp_path}/logs/%j_%t_log.out --kill-on-bad-exit=1" in command
    assert lines[-1] == f"{sys.executable} -m submit.job {tmp_path} $?"
    options, _ = script_of(tmp_path, "gpus_per_node=0", "ranks_per_node=4")
    assert options["ntasks-per-node"] == "4" and not {"gpus-per-node", "cpus-per-task"} & options.keys()


def test_every_field_reaches_sbatch(tmp_path):
    options, lines = script_of(
        tmp_path, "nodes=3", "gpus_per_node=8", "cpus_per_rank=12", "time_min=90", "stop_before_end_sec=60",
        "sbatch={exclude: node7, exclusive: true, gpus-per-node: 'a100:8', job-name: mine, mem: 96G}",
        'setup=["module load cuda"]', "python=/env/bin/python", jobs=6,
    )  # fmt: skip
    wanted = {
        "nodes": "3", "ntasks-per-node": "8", "gpus-per-node": "a100:8", "cpus-per-task": "12", "time": "90",
        "signal": "USR2@60", "job-name": "mine", "mem": "96G", "exclude": "node7", "exclusive": "", "array": "0-5%6",
    }  # fmt: skip
    assert {name: options[name] for name in wanted} == wanted
    assert any(line.startswith("srun ") and " --cpus-per-task=12 " in line for line in lines)
    assert "module load cuda" in lines and any(" /env/bin/python -u -m submitit" in line for line in lines)


def test_what_the_shell_has_for_slurm_does_not_win(monkeypatch):
    """sbatch would take its variables before its script's words; a job submits another one."""
    shell = {"SBATCH_PARTITION": "old", "SBATCH_ACCOUNT": "mine", "SLURM_JOB_ID": "3", "SLURM_CONF": "/a", "RANK": "1"}
    monkeypatch.setattr(os, "environ", dict(shell))
    clean_environment(launch("sbatch={partition:new}"))
    assert os.environ.keys() == {"SBATCH_ACCOUNT", "SLURM_CONF"}


@pytest.mark.parametrize(
    "word, said",
    [
        ("script=finetun", "launch.script: must be 'evaluate', 'export', 'finetune', 'finetune_sdxl'"),
        ("ranks_per_node=2", "launch.ranks_per_node: 2"),
        ("time_min=5", "launch.stop_before_end_sec: must be below"),
        ("script=export nodes=2", "launch.script: export.py is one process"),
    ],
)
def test_wrong_values_are_refused(word, said):
    with pytest.raises(ConfigError) as refused:
        launch(*word.split())
    assert refused.value.args[0].startswith(said)


def test_a_copy_of_the_code_is_complete_and_says_its_commit(tmp_path):
    """It composes without the working tree, and its runs name the commit that it was copied from."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("this is no git checkout")
    copy_code(tmp_path / "code")
    there = {path.name for path in (tmp_path / "code").iterdir() if path.is_dir()}
    assert there == set(FOLDERS) > {"conf", "data", "submit"}
    ask = "from utils.record.run_folder import git_state; import json; print(json.dumps(git_state()))"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "code", env={**os.environ, "PYTHONPATH": ""},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert json.loads(found)["commit"] == head


def test_jobs_of_a_sweep_are_those_that_are_not_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--multirun", "optim.lr=1,2,3", "sweep.name=rates"]
    complete = tmp_path / "outputs/sweeps/rates/lr=2/complete.json"
    complete.parent.mkdir(parents=True)
    complete.write_text("{}")
    (complete.parent / "overrides.txt").write_text("optim.lr=2\nrun_dir=outputs/sweeps/rates/lr=2\n")
    left = [[f"optim.lr={rate}", "sweep.name='rates'", f"run_dir=outputs/sweeps/rates/lr={rate}"] for rate in (1, 3)]
    assert slurm.list_jobs("finetune", words) == ("rates", left)
    with refuses("^sweep.wandb: "):
        slurm.list_jobs("finetune", [*words, "sweep.wandb=sweep.yaml"])


def test_no_slurm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with refuses(r"^launch: there is no sbatch here; submit on a login node"):
        queue_jobs(launch(), tmp_path, [])


@pytest.mark.parametrize("status, code", [(0, 0), (2, 2), (75, 0)])
def test_a_task_ends_with_the_status_of_its_script_unless_it_was_stopped(status, code, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr("submit.job.os._exit", sys.exit)
    monkeypatch.setattr("submit.job.signal.signal", lambda *_: None)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/ends.py").write_text(
        f"import os; open(os.environ['ATELIER_RUN_NOTE'], 'w'); raise SystemExit({status})"
    )
    with pytest.raises(SystemExit) as ended:
        ScriptJob("ends", [], tmp_path, tmp_path, ["env", sys.executable])()  # in place of python, as in a container
    assert ended.value.code == code and (tmp_path / "status_0_0/task_1").read_text() == f"{status}\n"


# what the two tasks have noted, the status of srun, how often the job has lost ranks before, its end; None: requeued
ENDS = [
    ([0, 0], 0, 0, 0),
    ([75, 75], 0, 0, None),
    ([70, 75], 70, 0, None),
    ([70], 1, 1, None),
    ([70, 70], 70, 2, 70),
    ([75, 2], 2, 0, 2),
    ([1, 2], 1, 0, 2),
    ([70, 134], 70, 0, 134),
    ([126], 126, 0, 126),
    ([], 127, 0, 127),
    ([], 137, 0, None),  # SIGKILL, SIGTERM and SIGABRT
    ([], 143, 0, None),
    ([], 134, 0, 134),
]


@pytest.mark.parametrize("noted, srun, before, end", ENDS)
def test_the_end_of_a_job(noted, srun, before, end, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    asked, slept = [], []

    def ask(program, *words):
        if "show" not in words:
            asked.append(words)
        elif not slept:  # a controller that is restarted for a moment is no end of a job
            raise NoAnswer
        return f"JobId={words[-1]} JobState=RUNNING Reason=None"

    monkeypatch.setattr("submit.job.ask", ask)
    monkeypatch.setattr("submit.job.time.sleep", slept.append)
    write_json(tmp_path / "job.json", {"launch": {"trains": True, "max_requeues": 9, "max_lost_ranks": 2}})
    for number in range(before):
        write_text(tmp_path / f"status_0_{number}/job", "70")
    for task, status in enumerate(noted):
        write_text(tmp_path / f"status_0_5/task_{task}", f"{status}")
    write_text(tmp_path / "run_0", f"{tmp_path}/run")
    (tmp_path / "run").mkdir()
    write_progress(tmp_path / "run", "stopped", step=3)
    status = finish(tmp_path, srun)
    assert RunReader(tmp_path / "run").progress == {"state": "requeued" if end is None else "stopped", "step": 3}
    if end is None:
        assert asked == [("requeue", "7")] and slept
    else:
        assert status == end and read_json(tmp_path / "end_0.json") == {"status": end, "restarts": 5}
        assert asked == ([("update", "JobId=7", "Requeue=0")] if end == 70 else []) and not slept


@pytest.mark.parametrize(
    "script, words, said",
    [
        ("prepare", ["job=manifest", "data=image_folder", "data.root=nowhere"], "data.root: 'nowhere' does not exist"),
        ("predict", ["weights=nowhere", "input=.", "output=found.csv"], "weights: "),
        ("finetune", [*TINY, "script=train", "data.root=images"], "launch.script"),
        ("finetune", [*TINY, "loop.batch_size=100", "data.root=images"], "100 does not divide by the 64 ranks"),
    ],
)
def test_a_script_is_checked_by_its_dry_run_with_the_ranks_of_the_job(
    script, words, said, tmp_path, monkeypatch, capsys, caplog, collection
):
    def dry_run(command, *, env, **_):
        set_variables(monkeypatch, env)
        return SimpleNamespace(returncode=run_command(script, command[2:], tmp_path, monkeypatch), stderr="")

    monkeypatch.setattr(slurm, "subprocess", SimpleNamespace(run=dry_run))
    size = ["nodes=8", "gpus_per_node=8"] if script == "finetune" else ["gpus_per_node=0"]
    words = [word.replace("=images", f"={collection}") for word in words]
    with pytest.raises(SystemExit) as refused:
        slurm.check_script(launch(f"script={script}", *size), words)
    assert refused.value.code == 2 and said in capsys.readouterr().err + caplog.text
