"""Run the stages of a recipe on a folder of images, each as its own command, and show them on one page.

    python workshop.py data.root=PATH                                  a tagger and a tiny SDXL of the images in PATH
    python workshop.py data.root=PATH run_dir=outputs/mine             in another folder
    python workshop.py data.root=PATH dry_run=true                     print the commands that are left
    python workshop.py data.root=PATH ~stages.sdxl_export              without a stage
    python workshop.py recipe=demo                                     a classifier of the embedded glyphs (make demo)

Each stage writes a folder in `run_dir`, the last one report.html. Recipes are in conf/recipe. Typed again after a kill,
a full disk or an error, the command goes on.
"""

from utils.start import begin

begin(__doc__)

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field

from data.config import DataConfig
from data.load import describe_collection, load_collection
from utils.config.entry_point import Job, entry_point
from utils.config.help import ROOT
from utils.config.schema import PathText, Strict
from utils.errors import EXIT_OK, UserError
from utils.io.files import Json, file_lock, output_errors, read_json, readable, write_json
from utils.io.safe_text import Lines, hide_secrets
from utils.ranks.processes import end_with_parent
from utils.record.figures import show_rows
from utils.record.logging import get_logger
from utils.record.report import PAGE, write_html
from utils.record.run_reader import LOCK_FILE, RESULT_FILE

log = get_logger(__name__)

_STAGES = "stages.json"  # the finished stages
Source = dict[str, str]  # command and images of a stage
Done = dict[str, Json]  # the sources of finished stages, with their seconds


def _is_command(text: str) -> str:
    if not shlex.split(text):
        raise ValueError("must begin with a script, such as finetune.py")
    return text


class Stage(Strict):
    """A command, and the files in `run_dir` that it leaves.

    $DATA is the images, $ROOT their folder, and $RUN is `run_dir`.
    """

    command: Annotated[str, AfterValidator(_is_command)]
    leaves: Annotated[list[PathText], Field(min_length=1)]


class WorkshopConfig(Strict):
    """conf/workshop.yaml, checked."""

    data: DataConfig
    run_dir: PathText
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    dry_run: bool


def complete_command(command: str, config: WorkshopConfig, job: Job) -> list[str]:
    """Return the words of a command. $DATA becomes what the command line says about the images."""
    data = [f"data={config.data.name}", f"data.root={config.data.root}"]
    data += [word for word in job.overrides if word.startswith("data.") and not word.startswith("data.root=")]
    words = []
    for word in shlex.split(command):
        words += data if word == "$DATA" else [word.replace("$RUN", config.run_dir).replace("$ROOT", config.data.root)]
    return words


def run_stage(name: str, words: list[str]) -> float:
    """Run a script as a process; returns its seconds. Raises SystemExit with its status if it fails.

    A stop signal is passed on, so that the stage can save. A stage ends with a killed workshop.
    """
    started = time.monotonic()
    script = [sys.executable, str(ROOT / words[0]), *words[1:]]
    log.info("== %s: python %s", name, hide_secrets(shlex.join(words)))
    process = subprocess.Popen(script, start_new_session=True, preexec_fn=end_with_parent)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if status != EXIT_OK:
        log.error("%s ended with status %d; its message is above. The same command goes on from there", name, status)
        raise SystemExit(status if status > 0 else 128 - status)  # a signal's number as in a shell
    return round(time.monotonic() - started, 1)


def show_stages(config: WorkshopConfig, title: str, done: Done) -> str:
    """Write the page: seconds, best figures, commands and pictures of the stages. Return the first two as a table."""
    run_dir = Path(config.run_dir)
    rows = []
    pictures = {}
    for name, stage in config.stages.items():
        row = {"stage": name, "seconds": done[name]["seconds"], "best": ""}
        rows.append(row)
        for file in (run_dir / leaf for leaf in stage.leaves):
            with readable(file, file.suffix):
                if file.suffix == ".png":
                    pictures[f"{name}: {file.name}"] = np.array(Image.open(file).convert("RGB"))
                elif file.name == RESULT_FILE:
                    found = read_json(file)
                    row["best"] = f"{found['metric']} {found['value']:.4g}"
    stages = [{**row, "command": done[row["stage"]]["command"]} for row in rows]
    seconds = sum(row["seconds"] for row in rows)
    write_html(run_dir / PAGE, title, {"all stages, seconds": seconds}, {"stages": stages}, pictures)
    return show_rows(rows)


def find_finished(sources: Mapping[str, Source], config: WorkshopConfig) -> Done:
    """Return the finished stages, whose files are there.

    Raises UserError (`run_dir`) if a stage was made by another command or of other images.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / _STAGES
    with readable(path, "JSON", "remove it"):
        earlier = read_json(path) if path.is_file() else {}
    done = {}
    for name in (name for name in sources if name in earlier):
        if not sources[name].items() <= earlier[name].items():
            found = f"{name} of another stages.{name}.command, or of other images"
            raise UserError(f"run_dir: {run_dir} has the stage {found}; name another folder")
        if all((run_dir / file).exists() for file in config.stages[name].leaves):
            done[name] = earlier[name]
    return done


@entry_point("workshop", WorkshopConfig)
def main(config: WorkshopConfig, job: Job) -> str:
    """Run the stages that are not finished, then write the page."""
    # ------------------------------------------------------------------------------- 1. The images and what is left
    collection = load_collection(config.data)
    run_dir = Path(config.run_dir)
    log.info("%s", describe_collection(collection))
    commands = {name: complete_command(stage.command, config, job) for name, stage in config.stages.items()}
    texts = {name: hide_secrets(shlex.join(words)) for name, words in commands.items()}
    sources = {name: {"command": text, "images": collection.fingerprint} for name, text in texts.items()}
    done = find_finished(sources, config)
    left = [name for name in commands if name not in done]
    if done:
        log.info("finished already: %s", ", ".join(done))
    if config.dry_run:
        for name in left:
            log.info("%s: python %s", name, texts[name])
        return f"dry run: {len(left)} of {len(commands)} stages are left"

    # ---------------------------------------------------------------------------------------------- 2. The stages
    refusal = f"run_dir: another workshop is writing to {run_dir}; wait for it or give another run_dir"
    with output_errors("run_dir", run_dir), file_lock(run_dir / LOCK_FILE, refusal):
        for name in left:
            seconds = run_stage(name, commands[name])
            for file in config.stages[name].leaves:
                if not (run_dir / file).exists():
                    raise UserError(f"stages.{name}.leaves: {file} is not in {run_dir}; name what the command writes")
            done[name] = {**sources[name], "seconds": seconds}
            write_json(run_dir / _STAGES, done)

        # ---------------------------------------------------------------------------------------------- 3. The page
        log.info("%s", Lines(show_stages(config, f"Workshop: {describe_collection(collection)}", done)))
    return f"{len(done)} stages; {run_dir / PAGE}"


if __name__ == "__main__":
    main()
