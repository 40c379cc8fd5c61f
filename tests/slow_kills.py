"""Commands killed or stopped at random moments and typed again: predict.py, downsample, export, and training with
evaluations, probes, pictures and a range test. At chosen moments: tests/test_predict_tags.py (texts),
test_predict_pictures.py, data/tools/test_pack.py.
"""

import random
import shutil
import signal
import time

import pytest
import torch

from tests import support
from tests.in_process import SHORT, SMALL_MODEL, make_images, run
from utils.io.memo import file_version
from utils.io.weights import read_weights, write_weights

MOMENTS = 2  # at which each command and run is killed; more of them find rarer faults


def moment(number, longest_sec, draw):
    """Return the seconds until a kill, drawn from the part of the whole time with this number."""
    return (number + draw.random()) * longest_sec / MOMENTS


@pytest.fixture
def settled():
    """Files count as old after two seconds here, too, as in the processes that are killed."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a tagger and images, one with a line feed in its name and one that is damaged."""
    folder = tmp_path_factory.mktemp("kills")
    make_images(folder / "images")
    run("finetune", [*SMALL_MODEL, *SHORT, "task=tagging", "task.min_count=1", "data=image_folder", "data.root=images",
                     "run_dir=run", "model.head_init_scale=1.0"], folder)  # fmt: skip
    file = folder / "run/weights/best_weights.safetensors"
    tensors, metadata = read_weights(file)
    varied = torch.randn(tensors["head.weight"].shape, generator=torch.Generator().manual_seed(0)) * 3
    write_weights(file, {**tensors, "head.weight": varied}, metadata)
    for number, image in enumerate(sorted((folder / "images").rglob("*.png"))):
        for copy in range(30):
            (folder / "new").mkdir(exist_ok=True)
            shutil.copy(image, folder / f"new/{number:02}{copy:02}{chr(10) * (copy == 7)}.png")
    (folder / "new/0102.png").write_bytes(b"no image")
    return folder


# The longest time until a kill in seconds, script, words.
COMMANDS = """
0.6  predict weights=../run input=new device=cpu batch_size=2 workers=0 output=x.jsonl
0.6  predict weights=../run input=new device=cpu batch_size=2 workers=0 output=x.npz
0.6  prepare job=downsample data.root=new data=image_folder data.validation_fraction=0.0 job.longest_px=20 job.to=small
2.0  export format=wd14 run_dir=../run output=made
"""


def written(folder):
    """Return the files of a folder, hidden ones too, but caches and consoles."""
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if not path.parts[0].startswith("output")}


@pytest.mark.parametrize("command", COMMANDS.strip().splitlines(), ids=lambda line: line.split()[-1])
def test_a_command_that_was_killed_is_typed_again(command, place):
    longest_sec, script, *words = command.split()
    whole, killed = place / "whole", place / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "new", folder / "new")
    while not all(map(file_version, killed.glob("new/*"))):  # rows of images that are too young do not count
        time.sleep(0.1)
    support.run(f"{script}.py", words, whole)
    draw, left = random.Random(words[-1]), []
    for number in range(MOMENTS):
        started = support.start(f"{script}.py", words, killed)
        while started.processes[0].is_alive() and not list(killed.rglob("*.journal")):
            time.sleep(0.005)
        time.sleep(moment(number, float(longest_sec), draw))
        started.signal(signal.SIGKILL)
        started.wait()
        left += killed.rglob("*.journal")
    started = support.start(f"{script}.py", words, killed)
    assert left and started.wait() == [0]
    assert written(killed) == written(whole)


OFTEN = ["loop.batch_size=8", "loop.evaluate_every_epochs=0.3"]
DRAWN = ["task.samples.prompts=[a cat,a dog]", "task.samples.steps=4", "task.latent_cache=latents"]
RANGE = ["lr_finder.enabled=true", "lr_finder.steps=100", "optim.lr=null", "loop.evaluate_every_epochs=3"]


SAVES = ["loop.checkpoint_every_steps=3", "loop.micro_batch_size=2", "loop.ema_decay=0.95", "runtime.workers=2",
         "model.drop_path_rate=0.2"]  # fmt: skip
LOST = [*SAVES, "loop.checkpoint_mirror=s3://runs"]  # the disk is lost with each machine


@pytest.mark.parametrize(
    ("task", "words", "steps", "longest_sec", "number", "ranks"),
    [
        ("fcmae", ["task.probe.k=3", "task.probe.every_epochs=0.1"], 14, 0.15, signal.SIGTERM, 1),
        ("diffusion", DRAWN, 7, 0.5, signal.SIGTERM, 1),
        ("classification", RANGE, 100, 0.3, signal.SIGTERM, 1),
        ("fcmae", SAVES, 30, 0.5, signal.SIGKILL, 1),
        ("classification", LOST, 40, 0.5, signal.SIGKILL, 2),
    ],
)
def test_a_run_that_is_ended_at_random_moments(task, words, steps, longest_sec, number, ranks, tmp_path, store):
    """It leaves within seconds, and its rows and weights are those of an undisturbed run."""
    data = support.make_collection(tmp_path / "data")
    script = support.SCRIPTS[task]
    overrides = support.common(task, data, "run", *OFTEN, f"loop.total_steps={steps}", *words)
    store.makedirs("runs", exist_ok=True)
    place = {"AWS_ENDPOINT_URL": store.endpoint_url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    support.run(script, [*overrides, "run_dir=straight"], tmp_path, ranks, variables=place)
    draw, seconds, statuses = random.Random(task), [], []
    for part in range(ranks * MOMENTS):
        started = support.start(script, overrides, tmp_path, ranks, variables=place)
        marks = ("train loss", "resumed from", "range test") if part or number == signal.SIGKILL else ("",)
        while started.processes[0].is_alive() and not any(mark in started.output for mark in marks):
            time.sleep(0.01)
        time.sleep(moment(part, longest_sec, draw))
        began = time.monotonic()
        started.signal(number)
        statuses += started.wait()
        seconds.append(time.monotonic() - began)
        if ranks > 1:
            shutil.rmtree(tmp_path / "run")
    support.run(script, overrides, tmp_path, ranks, variables=place)
    ended = -signal.SIGKILL if number == signal.SIGKILL else 75
    assert set(statuses[1:]) <= {0, ended} and ended in statuses and max(seconds) < 5, seconds
    support.assert_same_rows(tmp_path / "straight", tmp_path / "run")
    straight, stopped = (support.checkpoint_tensors(tmp_path / name, steps) for name in ("straight", "run"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
