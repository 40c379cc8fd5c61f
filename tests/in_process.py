"""Root scripts in the test's own process: compose, validate, run, and tiny collections to run them on.

A script's start costs seconds of imports; here they are paid once. `run("finetune", [...])` is the body of
`python finetune.py ...` without Hydra's own command line.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from utils.config import CONF, ROOT, Job, quote_paths, validate

SCRIPTS = ("pretrain_fcmae", "finetune", "prepare", "evaluate", "predict", "export")
# Small enough that an update takes milliseconds.
TINY = [
    "model=convnextv2_glyph",
    "model.depths=[1,1]",
    "model.dims=[8,16]",
    "augment=glyphs",
    "augment.image_size_hw=[16,16]",
    "data=image_folder",
    "loop.total_steps=2",
    "loop.global_batch_size=4",
    "loop.batch_size=2",
    "loop.log_every_steps=1",
    "loop.checkpoint_every_steps=1",
    "runtime=reference",
    "runtime.device=cpu",
]
TINY_FCMAE = ["task.decoder_dim=8"]


def write_images(
    root: Path, classes: Sequence[str] = ("cat", "dog"), *, train: int = 4, val: int = 2, side_px: int = 16
) -> Path:
    """Write class folders of random PNG files below root/train and root/val; returns root."""
    draws = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def load_command(script: str) -> Any:
    """Return the command that a root script's `main` is."""
    return importlib.import_module(script).main


def compose(script: str, overrides: Sequence[str] = (), config_dir: Path = CONF) -> tuple[DictConfig, Job]:
    """Compose a script's configuration as its command line would; returns the values and the job."""
    quoted = quote_paths(list(overrides), multirun=False)
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        values = hydra_compose(script, overrides=quoted, return_hydra_config=True)
    choices = {group: str(choice) for group, choice in values.hydra.runtime.choices.items() if "hydra" not in group}
    values = DictConfig({key: values._get_node(key) for key in values if key != "hydra"})
    return values, Job(script, choices, quoted)


def configure(script: str, overrides: Sequence[str] = ()) -> tuple[Any, Job]:
    """Return a script's validated configuration, and the job."""
    values, job = compose(script, overrides)
    return validate(values, load_command(script).schema), job


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Change the working directory, and put torch's global settings back."""
    before = Path.cwd(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before[0])
        torch.set_num_threads(before[1])
        torch.use_deterministic_algorithms(before[2])


def run(script: str, overrides: Sequence[str], folder: Path) -> str:
    """Run a script's body in `folder` and return its line of result. Its errors are raised as they are."""
    config, job = configure(script, overrides)
    with working_in(folder):
        return load_command(script).main(config, job)


def run_command(script: str, arguments: Sequence[str], folder: Path, monkeypatch: Any) -> int:
    """Run a script's command, Hydra's command line included, in `folder`; returns the exit status."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *arguments])
    with working_in(folder):
        try:
            load_command(script)()
        except SystemExit as stop:
            return int(stop.code or 0)
    raise AssertionError("a command ends by SystemExit")
