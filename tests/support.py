"""What tests share: a tiny collection, and scripts run as real processes that start in a tenth of a second.

A script's start costs seconds, nearly all of them imports. `start` runs it in processes forked from a server that has
imported everything once, with the variables that torchrun would set. What is tested of torchrun itself uses `torchrun`.
"""

import csv
import io
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import chdir, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.config import CacheConfig, DataConfig
from data.images.decode import Decoder
from data.images.open import read_file
from data.tools.config import Manifest, Pack
from data.tools.pack import write_shards
from utils.config.help import CONF
from utils.errors import UserError
from utils.formats.background import DEFAULT
from utils.formats.thresholds import CATEGORY_PROFILES, OVERALL, PER_TAG, Threshold, ThresholdTable, write_thresholds
from utils.record import plots

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])

SCRIPTS = {
    "fcmae": "pretrain_fcmae.py",
    "classification": "finetune.py",
    "tagging": "finetune.py",
    "diffusion": "finetune_sdxl.py",
    "autoencoder": "finetune_vae.py",
    "multicrop": "tests/tasks/multicrop.py",
}
SMALL_MODEL = ["model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]"]  # an update takes milliseconds
TINY = {
    "fcmae": [*SMALL_MODEL, "task.decoder_dim=16"],
    "classification": [*SMALL_MODEL, "model.head_init_scale=1.0"],
    "tagging": [*SMALL_MODEL, "task=tagging", "task.min_count=1", "model.head_init_scale=1.0", "data=image_folder"],
    "diffusion": [
        "model=sdxl_tiny",
        "task.latent_cache=null",
        "task.caption_chunks=1",
        "task.buckets.sizes_hw=[[[64,64],[64,96],[96,64]]]",
        "task.buckets.crop=random",
        "task.buckets.flip=0.5",
        "task.captions.shuffle=true",
        "task.captions.tag_dropout=0.2",
        "task.samples.image_size_hw=[64,64]",
        "task.samples.steps=3",
    ],
    "autoencoder": [
        "model=sdxl_tiny",
        "task.crop_px=32",
        "task.buckets.sizes_hw=[[[64,64],[64,96],[96,64]]]",
        "task.discriminator.weight=0.05",
        "task.discriminator.start_step=3",
        "optim.lr=1e-4",  # at larger ones, two players multiply rounding errors
    ],
    "multicrop": [],
}
OF_DIFFUSERS = ("diffusion", "autoencoder")


def draw_shape(letter, draw):
    """Return [H, W, 3] uint8: a square (A), a disc (B), a cross (C) or stripes, anywhere; the same on every machine."""
    height, width = draw.randint(36, 60), draw.randint(36, 60)
    y, x = np.mgrid[:height, :width]
    radius = draw.randint(6, 14)
    dy, dx = np.abs(y - draw.randint(14, height - 15)), np.abs(x - draw.randint(14, width - 15))
    inside = {
        "A": np.maximum(dy, dx) < radius,
        "B": dy**2 + dx**2 < radius**2,
        "C": (np.minimum(dy, dx) < 3) & (np.maximum(dy, dx) < radius),
    }.get(letter, (dy % 4 < 2) & (dx < radius))
    background = np.array([255, draw.randint(0, 255), 255])
    return np.where(inside[..., None], np.array([0, 0, 0]), background).astype(np.uint8)


def make_collection(root, per_class=18, classes="ABC", validation=5, broken=0, seed=0):
    """Write class folders of small PNGs with .txt tags, some of them unreadable."""
    draw = random.Random(seed)
    for split, count in (("train", per_class), ("val", validation)):
        for letter in classes:
            folder = root / split / letter
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw_shape(letter, draw)).save(folder / f"{number:03}.png")
                tags = draw.sample([f"tag {tag}" for tag in range(40)], draw.randint(1, 6))
                (folder / f"{number:03}.txt").write_text(", ".join(tags))
    for number in range(broken):
        (root / "train" / classes[0] / f"broken{number}.png").write_bytes(b"" if number == 0 else b"no image at all")
    return root


def read_image(path, channels, max_pixels, background=DEFAULT, **options):
    """Read and decode an image file, uint8 [H, W, channels]; options: further ones of the decoder."""
    return Decoder(channels, max_pixels, background, **options)(read_file(path), os.fspath(path))


def encoded(image, form="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation=6):
    """Return EXIF that says how the camera was held; by default, on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def read_conf(name):
    """Return the values of a file of conf/."""
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def cache_config(**changes):
    return CacheConfig(**read_conf("data/glyphs")["cache"] | changes)


def data_config(**changes):
    """Return the values of data=image_folder, with changed ones."""
    return DataConfig(**read_conf("data/image_folder") | {"root": "x"} | changes)


def write_manifest(root, *, verify=False, **changes):
    """Write the manifest of a folder by job=manifest and return it; changes: of `data_config`."""
    data = data_config(**{"root": str(root), "validation_fraction": 0.0, **changes})
    Manifest(name="manifest", verify=verify).run(data)
    return pq.read_table(Path(root, "manifest.parquet"))


def pack_collection(collection, output, shard_mib=1):
    return write_shards(Pack(name="pack", output=str(output), shard_mib=shard_mib), collection)


def common(task, data, run_dir, *more):
    """Return the overrides of a tiny run of a task; skip the test where the packages of the task are missing."""
    if task in OF_DIFFUSERS:
        pytest.importorskip("diffusers", reason="make install-sdxl")
    return [
        "optim.lr=0.005",
        *TINY[task],
        *(["data=image_folder", "augment=glyphs"] if task in ("fcmae", "classification") else []),
        *(["augment.image_size_hw=[32,32]"] if task not in OF_DIFFUSERS else []),
        f"data.root={data}",
        f"run_dir={run_dir}",
        "runtime=reference",
        "runtime.threads=1",
        "runtime.device=cpu",
        "schedule.warmup_steps=2",
        "schedule.warmup_most=1.0",
        "loop.log_every_steps=1",
        "loop.evaluate_every_epochs=1",
        "tracking.samples=true",
        *more,
    ]


@contextmanager
def refuses(match, *words):
    """Expect a UserError with this text, and these words."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert all(word in str(caught.value) for word in words), caught.value


def placed(file):
    """Return a file after making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@contextmanager
def no_large_allocation(mib=64):
    """Let an allocation fail that takes this process more than so many MiB beyond what it has; for Linux."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def draw_nothing(metrics, path, title):
    """Stand for `utils.record.plots.plot_curves`, which takes a third of the time of a run of some steps."""


def _run_rank(script, overrides, cwd, variables, output, kill_at_step):
    """Be one rank: in a session of its own, so that its loader's workers die with it."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the loader's workers start as in a process of a user's
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(variables)
    os.chdir(cwd)
    if kill_at_step is not None:
        from engine.update.learner import Learner

        update = Learner.update

        def fatal(learner, *arguments, **named):
            if learner.step == kill_at_step:
                for thread in threading.enumerate():  # so that a test knows which checkpoint there is
                    if thread.name.startswith("checkpoint writer"):
                        thread.join()
                os.killpg(0, signal.SIGKILL)
            return update(learner, *arguments, **named)

        Learner.update = fatal
    if "CURVES" not in variables:
        plots.plot_curves = draw_nothing
    sys.argv = [script, *overrides]
    sys.path[0:0] = [str(ROOT), str((ROOT / script).parent)]
    if script.startswith(("bench/", "/")):  # as in a process of a user's: what it imports of ours, it must find itself
        sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    if script.startswith("/"):  # of another copy of the program
        ours = {file.stem for file in ROOT.glob("*.py")} | {file.parent.name for file in ROOT.glob("*/*.py")}
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Started:
    """The processes of one command; `output` is what all of them printed."""

    def __init__(self, processes, output):
        self.processes, self._output = processes, output

    def wait(self, timeout=500):
        """Wait for all; returns their exit codes."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return codes

    def signal(self, number, ranks=None):
        """Send a signal to the sessions of some ranks."""
        for index, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or index in ranks):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:  # it has no session yet, or has just ended
                    if process.is_alive():
                        os.kill(process.pid, number)

    @property
    def output(self):
        """What was printed so far."""
        return self._output.read_text() if self._output.exists() else ""


def start(script, overrides, cwd, ranks=1, kill_at_step=None, variables=None):
    """Start a script on so many ranks in `cwd`; SIGKILL itself before update `kill_at_step` (counted from 0).

    Several ranks get torchrun's variables beside `variables`. Only with a variable CURVES, curves are drawn.
    """
    output = Path(cwd) / f"output_{random.getrandbits(40):010x}.txt"
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        own = dict(variables or {})
        if ranks > 1:
            own |= {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        process = FORKS.Process(target=_run_rank, args=(script, overrides, str(cwd), own, str(output), kill_at_step))
        with chdir(ROOT):  # from elsewhere, the server would start without tests/preload.py
            process.start()
        processes.append(process)
    return Started(processes, output)


def run(script, overrides, cwd, ranks=1, expect=0, kill_at_step=None, variables=None):
    """Run a script to its end and check its exit codes; returns what it printed."""
    started = start(script, overrides, cwd, ranks, kill_at_step, variables)
    codes = started.wait()
    assert codes == [expect] * ranks, f"{script} on {ranks} ranks ended with {codes}:\n{started.output[-6000:]}"
    return started.output


def command(*arguments, cwd=ROOT, timeout=500, **variables):
    """Run a real command of the virtual environment (`python`, `torchrun`) as a user would."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    try:
        return subprocess.run(
            list(map(str, arguments)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as expired:  # its own message has the first bytes alone
        said = (expired.stderr or b"").decode(errors="replace")
        raise AssertionError(f"{arguments[0]} is still running after {timeout} s:\n{said[-6000:]}") from None


def is_reading(name):
    """Return whether two equal runs do not share a figure: a reading of the clock, of memory or of caches."""
    return name.rpartition("/")[2] in ("images_per_sec", "seconds", "peak_memory_gib") or "data/" in name


def rows(path, kind=None):
    """Return a JSONL file's rows, without readings."""
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    found = [{name: value for name, value in row.items() if not is_reading(name)} for row in found]
    return [row for row in found if kind is None or row["kind"] == kind]


def logged(run_dir, kind, name):
    """Return the values of a figure in the rows of a kind of a run's metrics.jsonl."""
    return [row[name] for row in rows(run_dir / "metrics.jsonl", kind)]


def contents(folder, pattern="*"):
    """Return path -> bytes of all files of a folder that match a pattern."""
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob(pattern)) if file.is_file()
    }


def front_matter(card):
    """Return the values at the head of a README.md."""
    return yaml.safe_load(card.split("---\n")[1])


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def assert_same_rows(first, second, tolerance=1e-5):
    """Compare all rows of two runs' metrics.jsonl, the evaluations' too, without readings."""
    for a, b in zip(rows(first / "metrics.jsonl"), rows(second / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, rel=tolerance) if isinstance(value, float) else value), name


def read_table(path):
    """Return the rows of a CSV file as name -> text."""
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def training_log(run_dir):
    """Return the lines of a run's training_log.txt as name -> text, without readings."""
    lines = read_table(Path(run_dir) / "training_log.txt")
    return [{name: text for name, text in line.items() if not is_reading(name)} for line in lines]


def samples_by_step(run_dir):
    """Return step -> sorted (id, key) pairs over all ranks, from a run's samples/."""
    steps = {}
    for path in sorted((Path(run_dir) / "samples").glob("rank_*.jsonl")):
        for row in rows(path):
            steps.setdefault(row["step"], []).extend(zip(row["ids"], row["keys"]))
    return {step: sorted(pairs) for step, pairs in steps.items()}


def thresholds_of(vocabulary, categories, tags):
    """Return a table of thresholds: of categories, 0.35 over all tags, and of tags' own, by (category, name)."""
    least = {**categories, OVERALL: 0.35}
    every = [((number, ""), value, profile) for profile in CATEGORY_PROFILES for number, value in least.items()]
    every += [(key, tags.get(key, least.get(key[0], 0.35)), PER_TAG) for key in vocabulary.columns]
    rows = (Threshold(*key, value, None, None, None, 0, profile) for key, value, profile in every)
    return ThresholdTable(vocabulary.hash, tuple(rows))


def checkpoint_tensors(run_dir, step):
    """Return all tensors of a checkpoint under file/name."""
    folder = Path(run_dir) / f"checkpoints/step_{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"{folder} has no tensors"
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape, name
        difference = (tensor.double() - second[name].double()).abs().max() if tensor.numel() else torch.tensor(0.0)
        assert difference <= tolerance and tensor.dtype == second[name].dtype, f"{name} differs by {difference:.3e}"


def assert_equal_runs(one, other, steps):
    """Compare the last checkpoints and all rows of two runs bit for bit."""
    assert_same_tensors(checkpoint_tensors(one, steps), checkpoint_tensors(other, steps))
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")


def export(form, model, metadata, folder, whole=None, thresholds=None, **settings):
    """Write a model's files in a format, as export.py does; returns the report."""
    from engine.exports.config import ExportConfig
    from engine.exports.formats import write_export
    from engine.exports.opened_task import OpenedTask

    values = dict.fromkeys(ExportConfig.model_fields) | {"weights": "w", "output": "o", "precision": "fp32"}
    values |= {
        "dry_run": False,
        "model": {"path": None, "vae": None},
    }
    values |= {"format": form, **settings}
    with tempfile.TemporaryDirectory() as scratch:
        if thresholds is not None:
            write_thresholds(Path(scratch) / "thresholds.csv", thresholds, "hash")
            values["thresholds"] = f"{scratch}/thresholds.csv"
        weights = OpenedTask(Path("w"), model, whole or model.network, {**metadata, "weights_hash": "hash"})
        return write_export(weights, Path(folder), ExportConfig.model_validate(values))
