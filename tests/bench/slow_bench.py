"""The benches as a user starts them: each ends by itself. Their figures mean nothing here."""

import re

import pytest

from tests.in_process import SMALL_MODEL, make_images
from tests.support import run

TABLES = ["minute", "step_overhead", "finetune_step", "pretrain_step", "sdxl", "memory"]


@pytest.mark.parametrize("name", TABLES)
def test_a_bench_prints_a_table_of_ratios(name, tmp_path):
    pytest.importorskip("diffusers" if name in ("sdxl", "memory") else "torch", reason="make install-sdxl")
    lines = run(f"bench/{name}.py", ["quick"], tmp_path).splitlines()
    heads = [number for number, line in enumerate(lines) if line.endswith("ratio (least to greatest)")]
    assert heads and lines[heads[0]].startswith("setting") and heads[-1] < len(lines) - 1


def test_the_loader_bench_ends_with_the_settings_to_type(tmp_path):
    words = [*SMALL_MODEL, "augment=glyphs", f"data.root={make_images(tmp_path / 'images')}"]
    last = run("bench/loader.py", ["quick", *words], tmp_path).splitlines()[-1]
    assert re.fullmatch(r"runtime\.workers=\d+ augment\.on_device=(true|false)", last)
