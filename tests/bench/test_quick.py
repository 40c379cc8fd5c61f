"""The benches as a user starts them: each ends by itself and prints its ratios. Their figures mean nothing here.

They run in forks, in place of processes that would each import torch and more; those that run commands of ours run in
this process, and their commands in forks.
"""

import importlib
import shutil
import sys

import pytest

from bench import commands
from tests.in_process import configure, make_images
from tests.support import ROOT, command, fork_call, fork_command

pytestmark = pytest.mark.slow


@pytest.fixture
def run_bench(monkeypatch, capsys):
    """Return a function that runs a bench, whose commands are forks; returns what it printed, and its errors."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", *words])
        importlib.import_module(f"bench.{name}").main()
        return capsys.readouterr()

    monkeypatch.setattr(commands.subprocess, "call", fork_call)
    monkeypatch.chdir(ROOT)
    return run


TABLES = [
    "step_overhead", "finetune_step", "pretrain_step", "onnx_speed", "tag_metrics", "tag_index", "sdxl", "decode",
    "loader_rivals", "freed_memory",
]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_bench_prints_a_table_of_ratios(name):
    if name == "sdxl":
        pytest.importorskip("diffusers")
    done = fork_command(f"bench/{name}.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows, path = done.stdout.splitlines()
    assert head.startswith("setting") and head.endswith("ratio (least to greatest)")
    assert rows and path == f"outputs/bench/quick/{name}.json"


def test_the_bench_of_the_index_prints_its_parts():
    done = fork_command("bench/manifest_index.py", "quick")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()[2:6]] == ["index", "again", "open", "worker"]


def test_the_bench_of_crops_prints_a_row_for_each_share(tmp_path):
    images = make_images(tmp_path / "images")
    done = fork_command("bench/crops.py", images)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["95%", "90%", "80%"]


SMALL = ["model=convnextv2_atto", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]"]


def test_the_loader_bench_prints_settings_that_a_command_takes(tmp_path):
    images = make_images(tmp_path / "images")
    done = fork_command("bench/loader.py", "quick", f"data.root={images}", *SMALL, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("reading alone") for line in lines) == 4
    assert sum(line.startswith("training step") for line in lines) == 4
    assert [word.partition("=")[0] for word in lines[-1].split()] == ["runtime.workers", "augment.on_device"]
    assert configure("finetune", lines[-1].split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seconds=soon"], "seconds: 'soon'; give the seconds of all turns together, 1 to 3600"),
        (["data=image_folder"], "data.root: must be given"),
        (["data.root=nowhere"], "data.root: 'nowhere' does not exist"),
        (["augment=lihgt"], "augment: unknown 'lihgt'; close: light"),
    ],
)
def test_the_loader_bench_refuses_bad_arguments(words, message):
    done = fork_command("bench/loader.py", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_fashion_mnist_bench_runs_on_images_of_noise(run_bench):
    """Its own arms, through prepare.py, pretraining and fine-tuning; timm's script is not at hand here."""
    head, *rows, path = run_bench("fashion_mnist", "quick").out.splitlines()
    assert head.startswith("arm") and [row.split()[0] for row in rows] == ["pretrained", "scratch", "train_half"]
    assert path == "outputs/bench/quick/fashion_mnist.json"


def test_the_lr_finder_bench_compares_three_finders_with_a_grid(run_bench):
    head, row, last = run_bench("lr_finder", "quick").out.splitlines()
    assert head.split()[-2:] == ["valley", "torch-lr-finder"] and row.startswith("made_resnet10t_sgd")
    assert last.startswith("within a factor of 3")


def test_the_bench_of_pretraining_goes_on_where_it_stopped(run_bench):
    shutil.rmtree(ROOT / "outputs/bench/when_to_pretrain/quick", ignore_errors=True)
    words = ["quick", "arms=fcmae", "labels=few", "minutes=0.05", "seeds=1"]
    first = run_bench("when_to_pretrain", *words)
    lines = first.out.splitlines()
    assert lines[0].startswith("500 labels") and lines[2] == "| arm | 0.05 min |" and lines[-1].endswith("table.md")
    assert lines[4].startswith("| FCMAE, ")
    again = run_bench("when_to_pretrain", *words)
    assert " s in all" in first.err
    assert again.out == first.out and " s in all" not in again.err  # nothing is trained again


@pytest.mark.parametrize("name", ["fashion_mnist", "lr_finder", "when_to_pretrain"])
def test_a_bench_that_runs_commands_starts_by_itself(name):
    done = command("python", f"bench/{name}.py", "bogus")
    assert done.returncode == 1 and "'bogus' is neither quick nor KEY=VALUE" in done.stderr
