r"""Submit a script to SLURM, through submitit.

    python submit/slurm.py                                            fine-tuning on the glyphs, on one GPU
    python submit/slurm.py launch.script=pretrain_fcmae launch.nodes=8 launch.gpus_per_node=8 experiment=NAME
    python submit/slurm.py launch.dry_run=true                        print the sbatch script, queue nothing
    python submit/slurm.py launch.script=train launch.time_min=60 data=image_folder data.root=PATH
    python submit/slurm.py --multirun optim.lr=0.001,0.003            a sweep, as one array

What begins with `launch` is read here (conf/launch/slurm.yaml); everything else goes to the script, which checks it by
its own dry run before anything is queued. docs/slurm.md leads from an empty cluster to a requeued job.
"""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of submit/

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

from submit.config import LaunchConfig
from submit.executor import container_words, make_executor, queue_jobs
from submit.follow import wait_for
from submit.job import ScriptJob
from submit.snapshot import copy_code
from utils.config.entry_point import Job, entry_point, quote_paths
from utils.config.help import ROOT
from utils.config.schema import Strict, path_keys
from utils.config.sweep import FLAGS, Sweep, parse_sweep
from utils.errors import EXIT_OK, UserError
from utils.io.files import output_errors, write_json
from utils.ranks.distributed import GPUS_VARIABLE, RANKS_VARIABLE
from utils.record.logging import get_logger

log = get_logger(__name__)

_FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p")
SCRIPT_WORDS: list[str] = []  # of the command line, outside `launch`


class SubmitConfig(Strict):
    """conf/slurm.yaml, checked."""

    launch: LaunchConfig


@entry_point("slurm", SubmitConfig)
def main(config: SubmitConfig, job: Job) -> str:
    """Check, copy, queue, and wait where asked to."""
    launch = config.launch
    # ------------------------------------------------------------------------------------------------- 1. The check
    sweep = read_sweep(launch.script, SCRIPT_WORDS) if FLAGS & set(SCRIPT_WORDS) else None
    jobs = [SCRIPT_WORDS] if sweep is None else list_jobs(sweep)
    if not jobs:
        return f"all jobs of the sweep {sweep.base} are complete"
    check_script(launch, jobs[0])
    if launch.dry_run:
        sys.stdout.write(make_executor(launch, Path(launch.folder) / "NAME").script_text(len(jobs)))
        return "dry run: nothing is queued"

    # ------------------------------------------------------------------------------------ 2. The folder, with the code
    folder = make_folder(launch)
    copy_code(folder / "code")
    write_json(folder / "job.json", {"launch": launch.model_dump(), "jobs": jobs})

    # ------------------------------------------------------------------------------------------------- 3. The queue
    torchrun_ranks = launch.ranks_on_node if launch.start == "torchrun" else None
    calls = [
        ScriptJob(
            launch.script, words, folder / "code", Path.cwd(), folder, index,
            container=container_words(launch, folder), torchrun_ranks=torchrun_ranks,
            max_lost_ranks=launch.max_lost_ranks, sweep=sweep and Path(sweep.base).name,
        )
        for index, words in enumerate(jobs)
    ]  # fmt: skip
    ids = queue_jobs(launch, folder, calls)
    log.info("job %s: %s.py in %s", ids[0].partition("_")[0], launch.script, folder)
    log.info("its logs, one for each task: %s", folder / "logs" / "*_log.out")

    # ---------------------------------------------------------------------------------------------------- 4. The end
    if launch.wait or launch.follow:
        status = wait_for(ids, folder, follow=launch.follow)
        if status != EXIT_OK:
            raise SystemExit(status)
    return f"job {ids[0]}"


def check_script(launch: LaunchConfig, words: list[str]) -> None:
    """Run the script's own dry run with the ranks of the job. Raises SystemExit with its status where it refuses."""
    command = [sys.executable, str(ROOT / f"{launch.script}.py"), *words, "dry_run=true"]
    environment = {**os.environ, RANKS_VARIABLE: str(launch.nodes * launch.ranks_on_node)}
    log.info("checking: %s", " ".join(command[1:]))
    if launch.gpus_per_node:
        environment[GPUS_VARIABLE] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != EXIT_OK:
        sys.stderr.write(done.stderr)
        log.error("nothing is queued: %s.py refuses what it was given", launch.script)
        raise SystemExit(done.returncode)


def read_sweep(script: str, words: list[str]) -> Sweep:
    """Return the sweep of a --multirun. The script's own schema says which words are paths."""
    keys = path_keys(importlib.import_module(script).main.schema)
    return parse_sweep(quote_paths(words, keys))


def list_jobs(sweep: Sweep) -> list[list[str]]:
    """Return the words of each job of a --multirun that is not complete, each with a run folder of its own."""
    if sweep.settings.trials is not None:
        raise UserError("sweep.trials: a search needs the results of the jobs before; run it without SLURM's array")
    jobs = list(sweep.jobs())
    left = [job.arguments for job in jobs if not job.is_complete]
    if len(left) < len(jobs):
        log.info("%d of the %d jobs are complete already", len(jobs) - len(left), len(jobs))
    return left


def make_folder(launch: LaunchConfig) -> Path:
    """Make and return a new folder for the job."""
    name = launch.job_name or launch.script
    for number in range(1000):
        tail = "" if number == 0 else f"-{number}"
        folder = Path(launch.folder).absolute() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}{tail}"
        with output_errors("launch.folder", folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
        return folder
    raise UserError(f"launch.folder: {launch.folder} has no free name; give another folder")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of `launch`, with Hydra's flags that show it, and those of the script."""
    own = re.compile(r"[+~]*launch[.=@]|--(help|hydra-help|cfg|info|package|resolve|version)\b|-[hcp]$")
    ours: list[str] = []
    theirs: list[str] = []
    before = ""
    for word in words:
        (ours if own.match(word) or before in _FLAGS_WITH_VALUE else theirs).append(word)
        before = word
    return ours, theirs


if __name__ == "__main__":
    sys.argv[1:], SCRIPT_WORDS = split_words(sys.argv[1:])
    main()
