"""The benches as a user starts them: each ends by itself. Their figures mean nothing here."""

import re

import pytest

from tests.in_process import make_images
from tests.support import command

TABLES = ["minute", "step_overhead", "finetune_step", "pretrain_step", "sdxl", "memory"]


@pytest.mark.parametrize("name", TABLES)
def test_a_bench_prints_a_table_of_ratios(name):
    pytest.importorskip("diffusers" if name in ("sdxl", "memory") else "torch", reason="make install-sdxl")
    done = command("python", f"bench/{name}.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows = done.stdout.splitlines()
    assert rows and head.startswith("setting") and head.endswith("ratio (least to greatest)")


def test_the_loader_bench_ends_with_the_settings_to_type(tmp_path):
    words = ["model=convnextv2_glyph", "augment=glyphs", "model.depths=[1,1]", "model.dims=[8,16]"]
    done = command("python", "bench/loader.py", "quick", f"data.root={make_images(tmp_path / 'images')}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"runtime\.workers=\d+ augment\.on_device=(true|false)", done.stdout.splitlines()[-1])
