r"""Submit a script to SLURM, through submitit.

    python submit/slurm.py                                            fine-tuning on the glyphs, on one GPU
    python submit/slurm.py launch.script=pretrain_fcmae launch.nodes=8 launch.gpus_per_node=8 experiment=NAME
    python submit/slurm.py launch.dry_run=true                        print the sbatch script, queue nothing
    python submit/slurm.py --multirun optim.lr=0.001,0.003            a sweep, as one array

Keys of `launch` are read here (conf/launch/slurm.yaml). All other words go to the script, which checks them in a dry
run before anything is queued. See docs/cluster.md.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # replaces submit/

from utils.start import begin

begin(__doc__)

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from submit.config import LaunchConfig
from submit.job import ScriptJob
from utils.config.entry_point import Job, entry_point, quote_paths
from utils.config.help import ROOT
from utils.config.schema import Strict
from utils.config.sweep import parse_sweep
from utils.config.sweep_config import FLAGS
from utils.errors import EXIT_OK, UserError
from utils.io.files import output_errors, write_json
from utils.ranks.distributed import GPUS_VARIABLE, RANKS_VARIABLE
from utils.record.logging import log
from utils.record.run_folder import GIT_FILE, git_state

SCRIPT_WORDS: list[str] = []  # the command line without the words for `launch`
# A copy of the code has the packages and their configuration.
FOLDERS = ["conf", *sorted(file.parent.name for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests")]


class SubmitConfig(Strict):
    """conf/slurm.yaml, checked."""

    launch: LaunchConfig


@entry_point("slurm", SubmitConfig)
def main(config: SubmitConfig, job: Job) -> str:
    """Check the command, copy the code and queue the job."""
    launch = config.launch
    # ------------------------------------------------------------------------------------------------- 1. The check
    sweep = None
    jobs = [SCRIPT_WORDS]
    if FLAGS & set(SCRIPT_WORDS):
        sweep, jobs = list_jobs(launch.script, SCRIPT_WORDS)
        if not jobs:
            return f"all jobs of the sweep {sweep} are complete"
    check_script(launch, jobs[0])
    if launch.dry_run:
        sys.stdout.write(script_text(launch, Path(launch.folder) / "NAME", len(jobs)))
        return "dry run: nothing is queued"

    # ------------------------------------------------------------------------------------ 2. The folder, with the code
    folder = Path(launch.folder).absolute() / f"{launch.script}-{time.strftime('%Y%m%d-%H%M%S')}"
    with output_errors("launch.folder", folder):
        copy_code(folder / "code")
        write_json(folder / "job.json", {"launch": {**launch.model_dump(), "trains": launch.trains}, "jobs": jobs})

    # ------------------------------------------------------------------------------------------------- 3. The queue
    tasks = [ScriptJob(launch.script, words, folder, Path.cwd(), launch.command, sweep) for words in jobs]
    ids = queue_jobs(launch, folder, tasks)
    return f"job {ids[0].partition('_')[0]}: {launch.script}.py in {folder}; its logs: {folder}/logs/*_log.out"


def list_jobs(script: str, words: list[str]) -> tuple[str, list[list[str]]]:
    """Return the name of a sweep, and the words of each job that is not complete."""
    schema = importlib.import_module(script).main.schema  # tells which words are paths
    sweep = parse_sweep(quote_paths(words, schema))
    if sweep.settings.wandb:
        raise UserError("sweep.wandb: W&B's agents start the jobs; write the file without submit/slurm.py")
    jobs = list(sweep.jobs())
    left = [list(job.words) for job in jobs if not job.is_complete]
    log.info("%d of the %d jobs are complete already", len(jobs) - len(left), len(jobs))
    return Path(sweep.base).name, left


def check_script(launch: LaunchConfig, words: list[str]) -> None:
    """Run the script with dry_run=true and the job's number of ranks. Raises SystemExit with its status on failure."""
    command = [sys.executable, str(ROOT / f"{launch.script}.py"), *words, "dry_run=true"]
    log.info("checking: %s", " ".join(command[1:]))
    environment = {**os.environ, RANKS_VARIABLE: str(launch.nodes * launch.ranks_on_node)}
    if launch.gpus_per_node:
        environment[GPUS_VARIABLE] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != EXIT_OK:
        sys.stderr.write(done.stderr)
        line = "nothing is queued: the dry run of %s.py failed; keys of the job begin with launch., as launch.script"
        log.error(line, launch.script)
        raise SystemExit(done.returncode)


def copy_code(target: Path) -> None:
    """Copy the code and the state of git, so that queued jobs do not change with the working tree."""
    target.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy2(file, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_json(target / GIT_FILE, git_state())


class _Executor(submitit.SlurmExecutor):
    """submitit's executor; can also be created without SLURM, to print its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def make_executor(launch: LaunchConfig, folder: Path) -> _Executor:
    """Return the executor of a job whose files are in `folder`."""
    python = shlex.quote(launch.python or sys.executable)
    # In this folder, Python finds the job's copy of the code first.
    options = {"chdir": str(folder / "code"), "requeue": True} | read_options(launch)
    srun = ["--kill-on-bad-exit=1"]
    if launch.cpus_per_rank is not None:
        srun.append(f"--cpus-per-task={launch.cpus_per_rank}")  # srun of SLURM 22.05 to 23.02 does not inherit it
    executor = _Executor(folder / "logs", python=python)
    executor.update_parameters(
        job_name=launch.script,
        nodes=launch.nodes,
        ntasks_per_node=launch.ranks_on_node,
        gpus_per_node=launch.gpus_per_node or None,
        cpus_per_task=launch.cpus_per_rank,
        time=launch.time_min,
        signal_delay_s=launch.stop_before_end_sec,
        wckey=None,
    )
    executor.update_parameters(
        setup=[*launch.setup, "trap : TERM USR1 USR2  # the tasks save; this script continues after them"],
        teardown=[f"{python} -m submit.job {shlex.quote(str(folder))} $?"],
        stderr_to_stdout=True,
        srun_args=srun,
        additional_parameters=options,
    )
    return executor


def read_options(launch: LaunchConfig) -> dict[str, bool | int | str]:
    """Return `launch.sbatch` with names as submitit spells them."""
    return {name.replace("-", "_"): value for name, value in (launch.sbatch or {}).items()}


def script_text(launch: LaunchConfig, folder: Path, jobs: int) -> str:
    """Return the sbatch script of a job, or of an array if there are several jobs."""
    executor = make_executor(launch, folder.absolute())
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "") + "\n"


def clean_environment(launch: LaunchConfig) -> None:
    """Remove environment variables of SLURM and of launchers: SBATCH_* would override the script's own lines.

    SBATCH_PARTITION, ACCOUNT, QOS and CONSTRAINT stay if `launch.sbatch` does not have their option.
    """
    kept = {
        f"SBATCH_{name.upper()}" for name in {"partition", "account", "qos", "constraint"} - {*read_options(launch)}
    }
    kept.add("SLURM_CONF")
    foreign = re.compile(r"S(LURMD?|BATCH|RUN|UBMITIT)_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")
    for name in set(os.environ) - kept:
        if foreign.fullmatch(name):
            del os.environ[name]


def queue_jobs(launch: LaunchConfig, folder: Path, jobs: Sequence[ScriptJob]) -> list[str]:
    """Queue the jobs, several as one array, and return their SLURM ids. Raises UserError if SLURM refuses them."""
    if shutil.which("sbatch") is None:
        raise UserError("launch: there is no sbatch here; submit on a login node of the cluster")
    try:
        clean_environment(launch)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints the error that it raises
            return [job.job_id for job in make_executor(launch, folder).submit_array(jobs)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"launch: SLURM refuses the job: {' '.join(str(error).split())}") from None


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the words for `launch`, with --help and --cfg, and the words for the script."""
    own = re.compile(r"[+~]*launch[.=@]|--(help|cfg)\b|-h$")
    ours = []
    rest = []
    for before, word in zip(["", *words], words):
        (ours if own.match(word) or before == "--cfg" else rest).append(word)
    return ours, rest


if __name__ == "__main__":
    sys.argv[1:], SCRIPT_WORDS = split_words(sys.argv[1:])
    main()
