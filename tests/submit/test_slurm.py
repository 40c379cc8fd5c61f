"""submit/slurm.py without a cluster: what goes where on the command line, the sbatch script, the copy of the code, the
jobs of a sweep. Real jobs are in tests/slurm/.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import FailedJobError, UncompletedJobError

from submit import slurm
from submit.config import LaunchConfig
from submit.executor import _clean_environment, container_words, make_executor, queue_jobs
from submit.follow import wait_for
from submit.job import _SIGNAL_SEC, ScriptJob, _meaning
from submit.queue import list_states
from submit.snapshot import FOLDERS, copy_code
from tests.in_process import TINY, compose, configure, run_command
from tests.support import ROOT
from utils.config.messages import ConfigError
from utils.config.sweep import parse_sweep
from utils.errors import UserError
from utils.ranks.distributed import GPUS_VARIABLE, RANKS_VARIABLE
from utils.ranks.job_status import note_task
from utils.record.logging import setup_logging


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
        "time": "1440",
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
    assert any(line.startswith("srun ") and " --cpus-per-task=12 " in line for line in lines)
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


def test_a_kind_of_gpu_can_be_asked_for(tmp_path):
    assert script_of(tmp_path, "gpus_per_node=4", "gpu_type=a100")[0]["gpus-per-node"] == "a100:4"


def test_only_the_script_runs_in_a_container(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["container=/images/atelier.sif", 'container_mounts=["/data"]', "python=/opt/python"]
    _, lines = script_of(tmp_path / "job", *words)
    assert any(line.endswith(f"{sys.executable} -u -m submitit.core._submit {tmp_path}/job/logs") for line in lines)
    binds = [word for mount in (tmp_path, f"{tmp_path}/job", "/data") for word in ("--bind", str(mount))]
    inside = ["apptainer", "exec", "--nv", *binds, "/images/atelier.sif", "/opt/python"]
    assert container_words(launch(*words), tmp_path / "job") == inside
    job = ScriptJob("finetune", ["seed=1"], tmp_path / "code", tmp_path, tmp_path, container=inside)
    assert job.command() == [*inside, "-u", f"{tmp_path}/code/finetune.py", "seed=1"]
    assert container_words(launch(), tmp_path) is None


def test_what_the_shell_has_for_slurm_does_not_win(tmp_path, monkeypatch):
    """sbatch would take its variables before its script's words; a job submits another one."""
    shell = {"SBATCH_PARTITION": "old", "SBATCH_ACCOUNT": "mine", "SLURM_JOB_ID": "3", "SLURM_CONF": "/a", "RANK": "1"}
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    with _clean_environment(launch("partition=new")):
        assert {name for name in shell if name in os.environ} == {"SBATCH_ACCOUNT", "SLURM_CONF"}
    assert {name: os.environ[name] for name in shell} == shell


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nodes=0", "launch.nodes: "),
        ("script=finetun", "launch.script: must be 'evaluate', 'export', 'finetune', 'finetune_sdxl'"),
        ("sbatch_lines=[exclude]", "launch.sbatch_lines: 'exclude'"),
        ('sbatch_lines=["--mem=3G"]', "launch.sbatch_lines: --mem"),
        ("ranks_per_node=2", "launch.ranks_per_node: 2"),
        ("gpu_type=a100 gpus_per_node=0", "launch.gpu_type: "),
        ("time_min=5", "launch.stop_before_end_sec: 300"),
        ("script=export nodes=2", "launch.script: export.py is one process"),
    ],
)
def test_wrong_values_are_refused(word, said):
    with pytest.raises(ConfigError) as refused:
        launch(*word.split())
    assert refused.value.problems[0].startswith(said)


@pytest.mark.parametrize(
    ("script", "trains"), [("train", True), ("pretrain_fcmae", True), ("evaluate", False), ("predict", False)]
)
def test_training_scripts_are_continued(script, trains):
    assert launch(f"script={script}").trains is trains


def test_a_copy_of_the_code_is_complete_and_says_its_commit(tmp_path):
    """It composes without the working tree, and its runs name the commit that it was copied from."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("this is no git checkout")
    copy_code(tmp_path / "code")
    assert (
        {path.name for path in (tmp_path / "code").iterdir() if path.is_dir()}
        == set(FOLDERS)
        > {"conf", "data", "submit"}
    )
    assert not list((tmp_path / "code").rglob("__pycache__"))
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
    assert slurm.list_jobs(parse_sweep(words)) == [
        [f"optim.lr={rate}", "sweep.name=rates", f"run_dir=outputs/sweeps/rates/lr={rate}"] for rate in (1, 3)
    ]
    with pytest.raises(UserError, match=r"^sweep.trials: a search needs the results of the jobs before"):
        slurm.list_jobs(parse_sweep([*words, "sweep.trials=3"]))


@pytest.mark.parametrize("count", [1, 2])
def test_no_slurm_is_said(count, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = ScriptJob("finetune", [], tmp_path, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"^launch: there is no sbatch here; submit on a login node"):
        queue_jobs(launch(), tmp_path, [job] * count)


def test_slurm_that_does_not_answer_is_asked_again(tmp_path, monkeypatch, capfd):
    """A controller that is restarted for a moment is no end of a job."""
    answers = iter([("1", "down"), ("0", "7|RUNNING|None"), ("1", "down"), ("0", "7|COMPLETED|None")])
    (tmp_path / "end_0.json").write_text(json.dumps({"status": 0, "restarts": 1}))

    def ask(*_, **__):
        code, said = next(answers)
        return SimpleNamespace(returncode=int(code), stdout=said, stderr="slurm_load_jobs error: Unable to contact")

    monkeypatch.setattr("submit.queue.subprocess.run", ask)
    monkeypatch.setattr("submit.follow._LOOK_SEC", 0.0)
    setup_logging()
    assert wait_for(["7"], tmp_path, follow=False) == 0
    said = capfd.readouterr().err
    assert said.count("SLURM does not answer") == 2 and "job 7: RUNNING" in said and "after 1 restarts" in said
    assert next(answers, None) is None


def test_the_members_of_an_array_are_asked_for_at_once(monkeypatch):
    lines = "7_0|RUNNING|None\n7_1|PENDING|JobArrayTaskLimit\n7_9|RUNNING|None\n"
    monkeypatch.setattr("submit.queue._ask", lambda *command: lines)
    found = list_states(["7_0", "7_1", "7_2"])
    assert found == {"7_0": ("RUNNING", "None"), "7_1": ("PENDING", "JobArrayTaskLimit")}


@pytest.mark.parametrize(
    ("status", "meaning"), [(0, 0), (2, 2), (75, 75), (-15, 75), (-12, 75), (-9, 70), (-11, 70), (-6, -6)]
)
def test_a_script_that_a_signal_ends_was_stopped_or_lost(status, meaning):
    assert _meaning(status) == meaning


def test_a_rank_that_hangs_where_another_has_failed_is_killed(tmp_path, monkeypatch, capfd):
    """They would wait for it until their time-out."""
    monkeypatch.setattr("submit.job._FAILURE_SEC", 0.2)
    monkeypatch.setattr("submit.job._AGAIN_SEC", 0.1)
    monkeypatch.setenv("SLURM_PROCID", "0")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/hangs.py").write_text("import time; time.sleep(60)")
    note_task(tmp_path / "status_0_0", 1, 3)
    job = ScriptJob("hangs", [], tmp_path / "code", tmp_path, tmp_path)
    assert job._run() == 3
    assert "another rank has failed, and this one does not end: it is killed" in capfd.readouterr().out


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The first task of job 7, whose script ends as lost; ending the process is SystemExit."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("submit.job.os._exit", sys.exit)
    (tmp_path / "lost.py").write_text("raise SystemExit(70)")
    return ScriptJob("lost", [], tmp_path, tmp_path, tmp_path, max_lost_ranks=2)


@pytest.mark.parametrize("status", [75, 0, 2])
def test_only_a_script_that_was_stopped_is_continued(job, status):
    words = ["bash", "-c", f"trap 'exit {status}' USR1; echo ready; while :; do sleep 0.01; done"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as job._process:
        assert job._process.stdout.readline() == b"ready\n"
        if status == 75:
            assert job.checkpoint().function is job and job._process is None
            assert not (job.folder / "end_0.json").exists()
            return
        with pytest.raises(SystemExit) as ended:
            job.checkpoint()
    assert ended.value.code == status
    assert json.loads((job.folder / "end_0.json").read_text()) == {"status": status, "restarts": 0}


def test_a_job_that_has_not_begun_is_continued(job):
    job._process = None
    assert job.checkpoint().function is job


def test_a_job_is_continued_until_it_has_lost_too_many_ranks(job, monkeypatch):
    continued, forbidden = [], []
    monkeypatch.setattr(ScriptJob, "_continue", lambda self, status: continued.append(status))
    monkeypatch.setattr("submit.job.forbid_requeue", forbidden.append)
    assert [job._run() for _ in range(2)] == [70, 70] and (continued, forbidden) == ([70, 70], [])
    assert job._run() == 70 and (continued, forbidden) == ([70, 70], ["7"])


@pytest.mark.parametrize("runs", [True, False])
def test_a_job_is_put_back_until_slurm_has_done_it(job, monkeypatch, runs):
    """One that SLURM itself ends is left to it."""
    asked, slept, answers = [], [], iter([False, False, True])
    monkeypatch.setattr("submit.job.is_running", lambda name: runs)
    monkeypatch.setattr("submit.job.requeue", lambda name: asked.append(name) or next(answers))
    monkeypatch.setattr("submit.job.time.sleep", slept.append)
    job._continue(75)
    assert (asked, slept) == ((["7"] * 3, [_SIGNAL_SEC, 5.0, 5.0, 600]) if runs else ([], [_SIGNAL_SEC, 600]))


def test_the_last_time_limit_ends_the_job_though_its_signal_comes_after_the_end_of_the_script(job, monkeypatch):
    """SLURM had signalled the other task first, so that the script had saved already."""
    asked = []
    monkeypatch.setattr("submit.job.is_running", lambda name: True)
    monkeypatch.setattr("submit.job.requeue", asked.append)
    (job.code / "lost.py").write_text("raise SystemExit(75)")

    def submitit_ends_it(*_):
        assert job.checkpoint().function is job
        raise UncompletedJobError

    old = signal.signal(signal.SIGUSR2, submitit_ends_it)
    late = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR2))
    monkeypatch.setattr(ScriptJob, "_wait", lambda self, folder: late.start() or self._process.wait())
    try:
        with pytest.raises(SystemExit) as ended:
            job()
    finally:
        signal.signal(signal.SIGUSR2, old)
    assert ended.value.code == 75 and not asked
    assert json.loads((job.folder / "end_0.json").read_text()) == {"status": 75, "restarts": 0}


def test_what_slurm_refuses_names_the_key(job, monkeypatch, tmp_path):
    def refuse(*_):
        raise FailedJobError("sbatch: error: Batch job submission failed:\n Invalid account")

    monkeypatch.setattr("submit.executor.shutil.which", str)
    monkeypatch.setattr("submit.executor._Executor.submit_array", refuse)
    with pytest.raises(UserError) as refused:
        queue_jobs(launch("account=vision"), tmp_path, [job])
    assert str(refused.value) == (
        "launch.account: SLURM refuses the job ('vision' was asked for): Batch job submission failed: Invalid account"
    )


@pytest.fixture
def in_this_process(tmp_path, monkeypatch, capsys):
    """Run the script that `check_script` starts in this process."""

    def run(command, *, env, **_):
        for name in {RANKS_VARIABLE, GPUS_VARIABLE} & set(env):
            monkeypatch.setenv(name, env[name])
        status = run_command(Path(command[1]).stem, command[2:], tmp_path, monkeypatch)
        return SimpleNamespace(returncode=status, stderr=capsys.readouterr().err)

    monkeypatch.setattr(slurm, "subprocess", SimpleNamespace(run=run))


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("prepare", ["job=manifest", "data=image_folder", "data.root=nowhere"], "data.root: 'nowhere' does not exist"),
        ("evaluate", ["run_dir=nowhere"], "run_dir: "),
        ("export", ["run_dir=nowhere"], "run_dir: "),
        ("predict", ["weights=nowhere", "input=.", "output=found.csv"], "weights: "),
    ],
)
def test_every_script_has_a_dry_run(script, words, said, tmp_path, in_this_process, capsys):
    with pytest.raises(SystemExit) as refused:
        slurm.check_script(launch(f"script={script}", "gpus_per_node=0"), words)
    assert refused.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_dry_run_of_a_script_sees_the_ranks_of_the_job(collection, in_this_process, capsys):
    """8 nodes of 8 GPUs: a batch of 100 does not divide; nothing is queued."""
    own = launch("nodes=8", "gpus_per_node=8")
    with pytest.raises(SystemExit) as refused:
        slurm.check_script(own, [*TINY, "loop.global_batch_size=100", f"data.root={collection}"])
    assert refused.value.code == 2
    assert "loop.global_batch_size: 100 does not divide by the 64 ranks" in capsys.readouterr().err


def test_the_schema_has_every_key_and_no_other():
    assert set(compose("slurm")[0]["launch"]) == set(LaunchConfig.model_fields)
