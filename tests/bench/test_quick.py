"""The benches as a user starts them: each ends by itself and prints its ratios. Their figures mean nothing here."""

import pytest

from tests.support import command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "words", ["step_overhead", "save_cost", "optimizer_step", "finetune_step", "cold_read", "onnx_speed"]
)
def test_a_bench_prints_a_table_of_ratios(words):
    done = command("python", f"bench/{words}.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows, path = done.stdout.splitlines()
    assert head.startswith("setting") and head.endswith("ratio (least to greatest)")
    assert rows and path == f"outputs/bench/quick/{words}.json"


def test_the_pretraining_bench_prints_its_rows():
    done = command("python", "bench/pretrain_step.py", "atto", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"share_of_bound"') == 1


def test_the_fashion_mnist_bench_runs_on_images_of_noise():
    """Its own arms, through prepare.py, pretraining and fine-tuning; timm's script is not at hand here."""
    done = command("python", "bench/fashion_mnist.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows, path = done.stdout.splitlines()
    assert head.startswith("arm") and [row.split()[0] for row in rows] == ["pretrained", "scratch"]
    assert path == "outputs/bench/quick/fashion_mnist.json"
