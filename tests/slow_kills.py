"""Training killed or stopped at random moments and typed again, with evaluations, probes, pictures and a range test.

Other commands are killed at chosen moments: test_predict_tags.py, test_predict_pictures.py, data/tools/test_pack.py.
"""

import random
import shutil
import signal
import time

import pytest

from tests import support

MOMENTS = 2  # at which each run is killed; more of them find rarer faults


def moment(number, longest_sec, draw):
    """Return the seconds until a kill, drawn from the part of the whole time with this number."""
    return (number + draw.random()) * longest_sec / MOMENTS


OFTEN = ["loop.batch_size=8", "loop.evaluate_every_epochs=0.3"]
DRAWN = ["task.samples.prompts=[a cat,a dog]", "task.samples.steps=4", "task.latent_cache=latents"]
RANGE = ["lr_finder.enabled=true", "lr_finder.steps=100", "optim.lr=null", "loop.evaluate_every_epochs=3"]


SAVES = ["loop.checkpoint_every_steps=3", "loop.micro_batch_size=2", "loop.ema_decay=0.95", "runtime.workers=2",
         "model.drop_path_rate=0.2"]  # fmt: skip
LOST = [*SAVES, "loop.checkpoint_mirror=s3://runs"]  # the disk is lost with each machine


@pytest.mark.parametrize(
    "task, words, steps, longest_sec, number, ranks",
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
    support.assert_same_tensors(*(support.checkpoint_tensors(tmp_path / name, steps) for name in ("straight", "run")))
