"""LightlyTrain, a rival in label-free pretraining: an environment of its own, and a run of it on a list of images.

    python = ensure_environment(ROOT / "outputs/bench/lightly_env")
    images = write_image_list(paths, folder / "images.txt")
    training = Training("simclr", images, seed=1)
    speed = pretrain(python, training, folder / "calibrate", steps=40).sec_per_step
    found = pretrain(python, training, folder / "simclr_1", steps=round(300 / speed))
    python finetune.py model=timm model.name=resnet18 model.in_channels=1 init_from=<found.weights> ...

LightlyTrain (AGPL-3.0) is only ever run, as a program in another process; nothing of it is imported or copied here.
This file is that program too: `-I bench/lightly.py SETTINGS.json`, with the environment's Python, passes the settings
to `lightly_train.pretrain`. -I keeps bench/ off the import path, where this file would hide the package `lightly`.

No run mirrors an image. A step's seconds are its batch and the wait for the next one, as LightlyTrain logs them; the
first ten steps, which start up, count as much as the mean of the others. Its telemetry, its progress bar, the update
check of albumentations and its checkpoints (of every epoch) are off, and its cache is inside the run's folder.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

VERSION = "0.18.*"
READY = "lightly_train.txt"  # in the environment's folder: what pip installed; written last
WINDOW = 10  # steps that start up
WEIGHTS, METRICS, LOG = "exported_models/exported_last.pt", "metrics.jsonl", "output.txt"
ENVIRONMENT = {
    "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",  # usage statistics
    "NO_ALBUMENTATIONS_UPDATE": "1",  # asks PyPI for a newer version at import
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# LightlyTrain's augmentations for 32 px of ink, without mirrors. Its default crops (from 8 % of an image on) and blurs
# (up to a deviation of 2 px) leave little of a character.
BLUR = {"prob": 0.3, "sigmas": [0.1, 1.0]}
CROPS = {
    "random_flip": None,
    "random_resize": {"min_scale": 0.4},
    "random_rotation": {"prob": 0.5, "degrees": 10},
    "gaussian_blur": BLUR,
}
# Method -> what `lightly_train.pretrain` gets beside `pretrain_arguments`' own. Tried on the glyphs, one seed, top-1 of
# the nearest neighbour and of a ridge regression on the frozen features, 958 characters of an unseen typeface:
#   simclr, 280 steps of 128: default crops and blur, no rotation 0.068, 0.129; these 0.156, 0.178
#   dino, 280 steps of 64: these 0.066, 0.122; 220 steps, rate of 0.008, momentum from 0.9, a head of 512 and 1,024
#   with batch norm, nothing frozen: 0.034, 0.071
# One thread, beside other work: 0.58 to 0.64 core-seconds per step of simclr, 0.82 of dino; for 20 steps of simclr 0.61
# and 0.51 with changes={"precision": "bf16-mixed"} (AVX-512 bf16). Two threads beside other work wait for each other: a
# step took 12 s. Measure on an idle machine.
METHODS = {
    "simclr": {"batch_size": 128, "transform_args": CROPS},
    "dino": {
        "batch_size": 64,
        # The default freezes the last layer for 1,250 steps, which is more than a short run has.
        "method_args": {"student_freeze_last_layer_steps": 20},
        "optim": "adamw",
        "optim_args": {"lr": 0.004},  # x batch / 256
        "transform_args": {
            **CROPS,
            "global_view_1": {"solarize": None, "gaussian_blur": {"sigmas": [0.1, 1.0]}},
            "local_view": {
                "num_views": 2,
                "view_size": [24, 24],
                "random_resize": {"min_scale": 0.2, "max_scale": 0.5},
                "gaussian_blur": BLUR,
            },
        },
    },
}


class Training(NamedTuple):
    """What LightlyTrain pretrains. images: a file of one absolute path per line; changes: replace keys of METHODS."""

    method: str
    images: Path
    model: str = "timm/resnet18"
    image_size_px: int = 32
    in_channels: int = 1
    threads: int = 2
    seed: int = 0
    changes: dict = {}


class Pretrained(NamedTuple):
    """The seconds of the steps, the mean of one without the first ten, and the backbone's weights (a timm file)."""

    seconds: float
    sec_per_step: float
    weights: Path


def fail(message):
    """End the bench with a message."""
    sys.exit(f"lightly: {message}")


def run_quietly(command, log, what, **more):
    """Run a command with its output in a file; ends the bench, with the output's last lines, where it fails."""
    with open(log, "w") as stream:
        code = subprocess.run(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, **more).returncode
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        fail(f"{what} ended with status {code} ({log}):\n{tail}")


def ensure_environment(folder):
    """Return the Python of an environment with LightlyTrain, made in `folder` where it is not there yet.

    It takes two minutes, a network or a mirror of PyPI, and 6.3 GB with the CUDA libraries that torch brings.
    """
    folder = Path(os.path.abspath(folder))
    python = folder / "bin/python"
    if (folder / READY).is_file() and python.exists():
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        fail(f"{folder} holds other things than a virtual environment; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    sys.stderr.write(f"lightly: installing lightly-train {VERSION} into {folder} (two minutes)\n")
    run_quietly([sys.executable, "-m", "venv", "--clear", folder], log, "making the virtual environment")
    package = f"lightly-train[timm]=={VERSION}"
    run_quietly([python, "-m", "pip", "install", package], log, f"pip install {package!r} (is PyPI within reach?)")
    found = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    (folder / READY).write_text(found)
    return python


def write_image_list(paths, file):
    """Write the absolute paths of images, one per line; returns the file."""
    paths = [os.path.abspath(path) for path in paths]
    if not paths:
        fail("there is no image to pretrain on")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path}\n" for path in paths))
    return file


def training_images(collection):
    """Return the paths of all images of a collection's training split, labelled or not."""
    return [collection.absolute_path(int(row)) for row in collection.rows("train")]


def pretrain_arguments(training, out, steps):
    """Return the arguments of `lightly_train.pretrain` for a run of some steps; `data` is the file of the paths."""
    if training.method not in METHODS:
        fail(f"method={training.method} is not one of {', '.join(METHODS)}")
    if steps < 1:
        fail(f"steps={steps} is not a number above 0")
    method = {**METHODS[training.method], **training.changes}
    count = len(training.images.read_text().splitlines())
    batches = count // method["batch_size"]  # it drops the last batch
    if batches == 0:
        fail(f"{count} images do not fill one batch of {method['batch_size']}")
    size = [training.image_size_px] * 2
    spread = [0.5] * training.in_channels
    transform = {"image_size": size, "num_channels": training.in_channels, "normalize": {"mean": spread, "std": spread}}
    return {
        "out": str(out), "data": str(training.images), "model": training.model, "method": training.method,
        "epochs": math.ceil(steps / batches), "seed": training.seed, "accelerator": "cpu", "devices": 1,
        "num_workers": 1, **method, "transform_args": {**transform, **method["transform_args"]},
        "loader_args": {"persistent_workers": True},
        "loggers": {"tensorboard": None},
        "callbacks": dict.fromkeys(("learning_rate_monitor", "early_stopping", "model_export", "model_checkpoint")),
        # enable_progress_bar=False is refused: LightlyTrain brings its own bar.
        "trainer_args": {
            "max_steps": steps, "log_every_n_steps": 1, "enable_checkpointing": False, "enable_model_summary": False,
        },
    }  # fmt: skip


def step_seconds(rows):
    """Return the seconds of each step from the rows of a run's metrics: its batch and the wait before it."""
    found = {}
    for row in rows:
        for key in ("profiling/batch_time", "profiling/data_time"):
            found[row["step"]] = found.get(row["step"], 0.0) + row.get(key, 0.0)
    return [found[step] for step in sorted(found)]


def mean_seconds(seconds):
    """Return the mean seconds of a step, without the first ones, which start up."""
    counted = seconds[WINDOW:] or seconds
    return sum(counted) / len(counted)


def clear(out):
    """Remove an earlier run of LightlyTrain, which refuses a folder that is there; any other folder ends the bench."""
    if out.exists() and any(out.iterdir()):
        if not (out / "settings.json").is_file():
            fail(f"{out} holds other things than an earlier run; name another folder")
        shutil.rmtree(out)


def pretrain(python, training, out, steps):
    """Pretrain without labels on the CPU for some steps; returns seconds and weights. `out` is the run's folder."""
    out = Path(os.path.abspath(out))
    clear(out)
    run = out / "run"
    arguments = pretrain_arguments(training, run, steps)
    out.mkdir(parents=True, exist_ok=True)
    settings = out / "settings.json"
    settings.write_text(json.dumps({"threads": training.threads, "arguments": arguments}, indent=2) + "\n")
    threads = {name: str(training.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    more = {**ENVIRONMENT, **threads, "LIGHTLY_TRAIN_CACHE_DIR": str(out / "cache")}
    run_quietly(
        [python, "-I", Path(__file__).resolve(), settings], out / LOG, training.method, env={**os.environ, **more}
    )
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    seconds = step_seconds(rows)
    if len(seconds) != steps:
        fail(f"{out}: {len(seconds)} steps were logged instead of {steps}")
    mean = mean_seconds(seconds)
    return Pretrained(mean * steps, mean, run / WEIGHTS)


def train_here(settings):
    """Run LightlyTrain in this process, which is one of its environment."""
    import lightly_train
    import torch

    torch.set_num_threads(settings["threads"])
    arguments = settings["arguments"]
    arguments["data"] = Path(arguments["data"]).read_text().splitlines()
    lightly_train.pretrain(**arguments)


if __name__ == "__main__":
    train_here(json.loads(Path(sys.argv[1]).read_text()))
