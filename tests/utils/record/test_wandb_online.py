"""W&B online, against a server of our own: what arrives there, and a server that stalls, fails or is gone.

Each run is a process of its own: W&B keeps its server and key for the life of a process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.in_process import TINY, make_images
from tests.support import ROOT, rows, start
from tests.utils.record.test_trackers import is_reading, read_wandb, wandb_rows
from tests.wandb_server import WandbServer

KEY = "0123456789abcdef" * 2 + "01234567"
WANDB = ["tracking=wandb", "tracking.project=photos"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("online") / "images")


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def launch(server, folder, script, *words):
    """Start a script that knows the server; TINY is for those that train."""
    variables = {"HOME": str(folder), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    return start(f"{script}.py", [*words], folder, variables=variables)


def train(server, images, folder, script, *words):
    return launch(server, folder, script, *TINY, f"data.root={images}", *WANDB, *words)


def wandb_id(run_dir):
    return (run_dir / "wandb_run_id.txt").read_text().strip()


def wait_until(holds, what, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)


def train_rows(run):
    """step -> loss of a run at the server; every step once."""
    found = run.rows("train/loss")
    assert len(dict(found)) == len(found)
    return dict(found)


def test_everything_of_a_run_arrives_with_its_lineage(server, images, tmp_path):
    """Pretraining, fine-tuning from it, an export: three runs, and artefacts that link them."""
    more = ["tracking.group=first", "tracking.notes=a note", "tracking.tags=[small]", "tracking.entity=tester"]
    pretraining = train(
        server, images, tmp_path, "pretrain_fcmae", "task.decoder_dim=8", "run_dir=pre", "loop.total_steps=2", *more
    )
    assert pretraining.wait() == [0], pretraining.output
    finetuning = train(server, images, tmp_path, "finetune", "run_dir=fine", "init_from=pre", "loop.total_steps=3")
    assert finetuning.wait() == [0], finetuning.output
    export = launch(server, tmp_path, "export", "format=safetensors", "run_dir=fine")
    assert export.wait() == [0], export.output
    assert not server.unknown

    pre, fine = (server.runs[wandb_id(tmp_path / name)] for name in ("pre", "fine"))
    said = pre.upserted
    assert (pre.project, said["entity"], said["displayName"], said["jobType"]) == (
        "photos", "tester", "pre", "pretrain_fcmae"
    )  # fmt: skip
    assert (said["groupName"], said["notes"], said["tags"]) == ("first", "a note", ["small"])
    assert fine.upserted["jobType"] == "finetune" and fine.exit_code == 0
    saved = json.loads((tmp_path / "fine/config.json").read_text())
    assert {name: value["value"] for name, value in fine.config.items() if name != "_wandb"} == saved
    assert any(name.startswith("media/images/images/reconstructions") for name in pre.files)

    logged = [
        {name: value for name, value in row.items() if not name.startswith("_") and not is_reading(name)}
        for row in fine.history
    ]
    figures = [row for row in logged if not any(name.startswith(("images/", "tables/")) for name in row)]
    assert figures == wandb_rows(tmp_path / "fine")
    train_names = {name for row in fine.history for name in row if name.startswith("train/")}
    assert {"train/lr", "train/grad_norm", "train/images_per_sec", "train/peak_memory_gib"} <= train_names
    assert {"tables/classes", "images/mistakes", "images/confusion"} <= {name for row in logged for name in row}

    kinds = {found.name: found for found in server.artifacts.values() if found.kind == "model"}
    weights = [f"weights-{wandb_id(tmp_path / name)}" for name in ("pre", "fine")]
    exported = f"export-{wandb_id(tmp_path / 'fine')}-safetensors"
    assert set(kinds) == {*weights, exported}
    assert all(found.state == "COMMITTED" for found in kinds.values())
    assert set(kinds[weights[1]].aliases) == {"best", "latest"} and kinds[weights[1]].metadata["script"] == "finetune"
    (number,) = [number for number, found in server.artifacts.items() if found.name == weights[1]]
    sent = server.uploads[f"/artifact/{number}/best_weights.safetensors"]
    assert sent == (tmp_path / "fine/weights/best_weights.safetensors").read_bytes()
    (number,) = [number for number, found in server.artifacts.items() if found.name == exported]
    assert f"/artifact/{number}/model.safetensors" in server.uploads

    run = server.runs[f"{wandb_id(tmp_path / 'fine')}-safetensors"]
    assert (pre.used, fine.used, run.used) == ([], [weights[0]], [weights[1]])
    assert run.upserted["jobType"] == "export" and run.upserted["displayName"] == "fine safetensors"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_without_model_artifact_no_weights_are_sent(server, images, tmp_path):
    words = ["run_dir=run", "loop.total_steps=1", "tracking.model_artifact=false"]
    assert train(server, images, tmp_path, "finetune", *words).wait() == [0]
    assert launch(server, tmp_path, "export", "format=pth", "run_dir=run").wait() == [0]
    assert not [found for found in server.artifacts.values() if found.kind == "model"] and len(server.runs) == 1


@pytest.mark.slow
def test_a_server_that_stalls_holds_no_step_up_and_loses_none(server, images, tmp_path):
    """It stalls as soon as the run is known; the run is stopped, and resumed when the server answers again.

    As a process that ends as a user's does: W&B's own end at the exit would wait for its server.
    """
    words = [*TINY, f"data.root={images}", *WANDB, "run_dir=run", "loop.total_steps=400"]
    command = [sys.executable, str(ROOT / "finetune.py"), *words, "loop.evaluate_every_epochs=1000"]
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    options = {"env": environment, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options)
    wait_until(lambda: server.runs, "the run at the server")
    server.mood = "stalls"
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(rows(metrics, "train")) > 20, "training")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=45)[1]
    assert process.returncode == 75, said
    stopped = int(re.search(r"stopped at step (\d+)", said).group(1))
    assert "W&B has not taken everything within 5 s; the rest is in the run folder" in said
    (run,) = server.runs.values()
    assert len(run.rows("train/loss")) < stopped < 400
    server.mood = "answers"
    again = subprocess.run(command, timeout=120, **options)
    assert again.returncode == 0, again.stderr
    expected = {row["step"]: row["loss"] for row in rows(metrics, "train")}
    assert train_rows(run) == expected and len(expected) == 400
    assert list(server.runs) == [wandb_id(tmp_path / "run")]


@pytest.mark.slow
def test_a_server_that_fails_leaves_the_run_offline_with_every_row(server, images, tmp_path):
    server.mood = "fails"
    started = train(server, images, tmp_path, "finetune", "run_dir=run", "loop.total_steps=5")
    assert started.wait() == [0], started.output
    assert "W&B: its server does not take this run" in started.output
    assert "; the run is recorded offline" in started.output and "Traceback" not in started.output
    (session,) = read_wandb(tmp_path / "run")
    assert [row["step"] for row in session["rows"] if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert session["id"] == wandb_id(tmp_path / "run")
    assert (tmp_path / "run/complete.json").exists()


@pytest.mark.slow
def test_a_server_that_fails_during_the_run_ends_nothing(server, images, tmp_path):
    words = ["run_dir=run", "loop.total_steps=60", "tracking.finish_timeout_sec=3"]
    started = train(server, images, tmp_path, "finetune", *words)
    wait_until(lambda: server.runs, "the run at the server")
    server.mood = "fails"
    assert started.wait() == [0], started.output
    assert "W&B has not taken everything within 3 s" in started.output
    assert (tmp_path / "run/complete.json").exists() and "Traceback" not in started.output
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "train")] == list(range(1, 61))


@pytest.mark.slow
def test_the_death_of_wandbs_own_process_is_a_warning(server, images, tmp_path):
    words = ["run_dir=run", "loop.total_steps=300", "loop.evaluate_every_epochs=1000"]
    started = train(server, images, tmp_path, "finetune", *words)
    wait_until(lambda: server.runs, "the run at the server")
    (core,) = [pid for pid in children_of(started.processes[0].pid) if "wandb-core" in command_of(pid)]
    os.kill(core, signal.SIGKILL)
    assert started.wait() == [0], started.output
    assert "tracking: W&B failed (" in started.output
    assert (tmp_path / "run/complete.json").exists()


def children_of(pid):
    return [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def command_of(pid):
    return open(f"/proc/{pid}/cmdline").read()


@pytest.mark.slow
def test_offline_rows_survive_the_death_of_everything(images, tmp_path):
    """A node that fails kills W&B's process too; the rows before the checkpoint that is resumed are there."""
    words = ["run_dir=run", "loop.total_steps=60", "loop.checkpoint_every_steps=10", "tracking.mode=offline"]
    words.append("loop.evaluate_every_epochs=1000")
    started = start("finetune.py", [*TINY, f"data.root={images}", *WANDB, *words], tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(rows(metrics, "train")) > 25, "training")
    everything = [started.processes[0].pid, *children_of(started.processes[0].pid)]
    for pid in everything:
        os.kill(pid, signal.SIGKILL)
    started.wait()
    again = start("finetune.py", [*TINY, f"data.root={images}", *WANDB, *words], tmp_path)
    assert again.wait() == [0], again.output
    logged = {row["step"] for session in read_wandb(tmp_path / "run") for row in session["rows"] if "train/loss" in row}
    assert logged == set(range(1, 61))


def test_the_jobs_of_a_sweep_are_a_group(server, images, tmp_path):
    """In turn, in one process: each job is a run of its own at the server."""
    words = ["--multirun", "seed=0,1", "sweep.name=seeds", "loop.total_steps=1"]
    started = train(server, images, tmp_path, "finetune", *words)
    assert started.wait() == [0], started.output
    assert [run.upserted["groupName"] for run in server.runs.values()] == ["seeds", "seeds"]
    assert sorted(run.upserted["displayName"] for run in server.runs.values()) == sorted(
        path.name for path in (tmp_path / "outputs/sweeps/seeds").iterdir()
    )
    assert all(len(run.rows("train/loss")) == 1 and run.exit_code == 0 for run in server.runs.values())


@pytest.mark.slow
def test_weights_of_a_run_that_went_on_without_wandb_have_no_lineage(server, images, tmp_path):
    words = [*TINY, f"data.root={images}", "run_dir=first"]
    assert launch(server, tmp_path, "finetune", *words, *WANDB, "loop.total_steps=1").wait() == [0]
    assert launch(server, tmp_path, "finetune", *words, "loop.total_steps=2").wait() == [0]
    second = train(server, images, tmp_path, "finetune", "run_dir=second", "init_from=first", "loop.total_steps=1")
    assert second.wait() == [0]
    assert "W&B: the lineage from first is not noted (its last start had tracking=jsonl)" in second.output
    assert len(server.runs[wandb_id(tmp_path / "second")].rows("train/loss")) == 1
