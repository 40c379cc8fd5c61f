"""Root scripts in the test's own process: compose, validate and run them without paying for their imports each time.

`run("finetune", [...], folder)` is the body of `python finetune.py ...` without Hydra's command line, `run_command` the
whole command. What only a process can show (status, traceback, files left open) uses tests/support.py.
"""

import importlib
import logging
import sys
from contextlib import contextmanager

import pytest
import torch

from data.layouts import glyphs
from engine.tasks.kinds import KINDS
from engine.update.learner import Learner
from tests.support import SMALL_MODEL, assert_equal_runs, make_collection
from utils.config.entry_point import validate
from utils.config.help import CONF, ROOT

TASKS = {name: row.scripts for name, row in KINDS.items()}  # the scripts that train each
TRAINING = sorted({script for scripts in TASKS.values() for script in scripts})
ON_IMAGES = [script for script in TRAINING if "- augment:" in (CONF / f"{script}.yaml").read_text()]
SCRIPTS = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "common")

SHORT = [
    "augment.image_size_hw=[16,16]", "loop.total_steps=2", "loop.batch_size=4", "loop.micro_batch_size=2",
    "loop.log_every_steps=1", "loop.evaluate_every_epochs=1", "loop.checkpoint_every_steps=1", "runtime=reference",
    "runtime.device=cpu", "runtime.threads=1",
]  # fmt: skip
TINY = [*SMALL_MODEL, *SHORT, "data=image_folder", "augment=glyphs"]


def make_images(root, classes="AB"):
    """Write 4 training and 2 validation images for each class; returns the folder."""
    return make_collection(root, per_class=4, classes=classes, validation=2)


def draw_few_glyphs(root):
    """Draw 8 glyphs of three faces, one for validation, that pass for the embedded collection; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "TRAIN_FACES", ("DejaVuSans", "DejaVuSerif"))
        patch.setattr(glyphs, "VAL_FACES", ("STIXGeneral",))
        patch.setattr(glyphs, "_FACES_OF_A_CLASS", 3)
        patch.setattr(glyphs, "read_codes", lambda face: map(ord, "AB()[]{}"))
        glyphs.draw_glyphs(root)
    return root


def load_command(script):
    """Return the command that the `main` of a root script, of submit/slurm.py or of `tests.tasks.multicrop` is."""
    return importlib.import_module("submit.slurm" if script == "slurm" else script).main


def compose(script, overrides=()):
    """Compose a script's configuration as its command line would; returns the values and the job."""
    return load_command(script).compose(list(overrides))


def configure(script, overrides=()):
    """Return a script's validated configuration, and the job."""
    values, job = compose(script, overrides)
    return validate(values, load_command(script).schema), job


@contextmanager
def working_in(folder):
    """Change the working directory, and put back what a run sets for its process."""
    threads, is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    logger = logging.getLogger("atelier")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logger, "handlers", [*logger.handlers])
        patch.setattr(logger, "propagate", logger.propagate)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(is_deterministic)


def run(script, overrides, folder):
    """Run a script's body in `folder` and return its line of result; its errors are raised as they are."""
    config, job = configure(script, overrides)
    with working_in(folder):
        return load_command(script).load()(config, job)


class Killed(Exception):
    """Stands for SIGKILL."""


def run_until_killed(script, overrides, folder, step):
    """Run a script's body that dies before update `step` (counted from 0)."""
    update = Learner.update

    def fatal(learner, *arguments, **named):
        if learner.step == step:
            raise Killed
        return update(learner, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", fatal)
        with pytest.raises(Killed):
            run(script, overrides, folder)


def check_resumption(script, overrides, folder, killed_at, steps):
    """Compare a run in straight/ bit for bit with one in killed/ that died before update `killed_at` and goes on."""
    run(script, [*overrides, "run_dir=straight"], folder)
    run_until_killed(script, [*overrides, "run_dir=killed"], folder, killed_at)
    run(script, [*overrides, "run_dir=killed"], folder)
    assert_equal_runs(folder / "straight", folder / "killed", steps)


def run_command(script, arguments, folder, monkeypatch):
    """Run a script's command, Hydra's command line included, in `folder`; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *arguments])
    with working_in(folder):
        try:
            load_command(script)()
        except SystemExit as stop:
            return int(stop.code or 0)
    raise AssertionError("a command ends by SystemExit")
