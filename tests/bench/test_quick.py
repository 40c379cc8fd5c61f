"""The benches as a user starts them: each ends by itself and prints its ratios. Their figures mean nothing here."""

import shutil

import pytest

from tests.in_process import configure, make_images
from tests.support import ROOT, command

pytestmark = pytest.mark.slow


TABLES = ["step_overhead", "save_cost", "optimizer_step", "finetune_step", "cold_read", "onnx_speed", "live_plots",
          "cpu_runtime"]  # fmt: skip


@pytest.mark.parametrize("words", TABLES)
def test_a_bench_prints_a_table_of_ratios(words):
    done = command("python", f"bench/{words}.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows, path = done.stdout.splitlines()
    assert head.startswith("setting") and head.endswith("ratio (least to greatest)")
    assert rows and path == f"outputs/bench/quick/{words}.json"


SMALL = ["model=convnextv2_atto", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]"]


def test_the_loader_bench_prints_settings_that_a_command_takes(tmp_path):
    images = make_images(tmp_path / "images")
    done = command("python", "bench/loader.py", "quick", f"data.root={images}", *SMALL, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    parts = ["read", "decode", "crop and resize", "augment in the worker", "collate", "draw for the device"]
    assert lines[0].startswith("part") and [line.split("  ")[0] for line in lines[1:7]] == parts
    assert sum(line.startswith("reading alone") for line in lines) >= 4
    by_prefetch = 0 if lines[-1].startswith("runtime.workers=0 ") else 1
    assert sum(line.startswith("training step") for line in lines) == 4 + by_prefetch
    assert lines[-3] == "outputs/bench/quick/loader.json" and lines[-2].startswith("why: ")
    keys = [word.partition("=")[0] for word in lines[-1].split()]
    assert keys == ["runtime.workers", "runtime.prefetch_batches", "augment.on_device"]
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
    done = command("python", "bench/loader.py", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_pretraining_bench_prints_its_rows():
    done = command("python", "bench/pretrain_step.py", "atto", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"share_of_bound"') == 1


def test_the_fashion_mnist_bench_runs_on_images_of_noise():
    """Its own arms, through prepare.py, pretraining and fine-tuning; timm's script is not at hand here."""
    done = command("python", "bench/fashion_mnist.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows, path = done.stdout.splitlines()
    assert head.startswith("arm") and [row.split()[0] for row in rows] == ["pretrained", "scratch", "train_half"]
    assert path == "outputs/bench/quick/fashion_mnist.json"


def test_the_lr_finder_bench_compares_the_rate_found_with_a_grid(tmp_path):
    images = make_images(tmp_path / "images")
    own = ["data=image_folder", f"data.root={images}", *SMALL]
    done = command("python", "bench/lr_finder.py", "quick", "rates=0.01,0.1", *own, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "| rate | top-1 |" and [line.split()[1] for line in lines[2:5]] == ["found:", "0.01", "0.1"]
    assert "times the best of the grid" in lines[5] and lines[6].startswith("the range test's share of the run's")


def test_the_bench_of_pretraining_goes_on_where_it_stopped():
    shutil.rmtree(ROOT / "outputs/bench/when_to_pretrain/quick", ignore_errors=True)
    words = ["quick", "arms=fcmae", "labels=few", "minutes=0.05"]
    first = command("python", "bench/when_to_pretrain.py", *words, "seeds=1", timeout=900)
    assert first.returncode == 0, first.stderr[-3000:]
    lines = first.stdout.splitlines()
    assert lines[0].startswith("500 labels") and lines[2] == "| arm | 0.05 min |" and lines[-1].endswith("curves.png")
    assert lines[4].startswith("| FCMAE, ")
    again = command("python", "bench/when_to_pretrain.py", *words, "seeds=1", timeout=900)
    assert " s in all" in first.stderr
    assert again.stdout == first.stdout and " s in all" not in again.stderr  # nothing is trained again
