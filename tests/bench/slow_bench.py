"""The benches and demos as a user starts them: each ends by itself. Their figures mean nothing here."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from importlib.util import find_spec
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from tests.in_process import draw_few_glyphs, make_images
from tests.support import ROOT, fork_command, start

TABLES = ["step_overhead", "finetune_step", "pretrain_step", "sdxl"]
SHORT = [
    "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]",
    "loop.total_steps=2", "loop.batch_size=8", "runtime.threads=1",
]  # fmt: skip
SHORT_SDXL = [
    "vae_steps=2", "loop.total_steps=2", "runtime.threads=1", "task.buckets.areas_px=[4096]", "task.buckets.min_px=32",
    "task.samples.prompts=[black,white]", "task.samples.steps=3", "task.samples.image_size_hw=[64,64]",
]  # fmt: skip
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="make install-sdxl")


@pytest.mark.parametrize("name", TABLES)
def test_a_bench_prints_a_table_of_ratios(name):
    pytest.importorskip("diffusers" if name == "sdxl" else "torch", reason="make install-sdxl")
    done = fork_command(f"bench/{name}.py", "quick", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    head, *rows = done.stdout.splitlines()
    assert rows and head.startswith("setting") and head.endswith("ratio (least to greatest)")


def test_the_loader_bench_ends_with_the_settings_to_type(tmp_path):
    words = ["model=convnextv2_glyph", "augment=glyphs", "model.depths=[1,1]", "model.dims=[8,16]"]
    done = fork_command("bench/loader.py", "quick", f"data.root={make_images(tmp_path / 'images')}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"runtime\.workers=\d+ augment\.on_device=(true|false)", done.stdout.splitlines()[-1])


FORKING_PYTHON = """\
#!{python} -S
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as connection:
    connection.send((os.getpid(), os.getcwd(), sys.argv[1:]))
    sys.exit(connection.recv())
"""


def run_forks(listener):
    """Run the script that a FORKING_PYTHON asks for and answer with the exit code; the next has a thread of its own."""
    with listener.accept() as connection:
        threading.Thread(target=run_forks, args=[listener], daemon=True).start()
        pid, cwd, (script, *words) = connection.recv()
        outputs = [f"/proc/{pid}/fd/{number}" for number in (1, 2)]
        [code] = start(script, words, cwd, variables={"CURVES": "drawn"}, outputs=outputs).wait(600)
        connection.send(code)


def run_demo(name, *words, timeout=900):
    """Run a demo's shell script from the repository; returns its status, output and errors.

    What it starts as `python` runs in forks: the imports of its thirteen processes would take a minute.
    """
    listener = Listener()
    threading.Thread(target=run_forks, args=[listener], daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "python"
        python.write_text(FORKING_PYTHON.format(python=sys.executable, address=listener.address))
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        command = ["bash", str(ROOT / f"bench/{name}.sh"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def check_demo(name, out, *words):
    """Run a demo to its end; returns its summary. Its pictures are there, and its table names them."""
    done = run_demo(name, f"out={out}", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    pictures = re.findall(r"^picture (\S+)$", done.stdout, flags=re.MULTILINE)
    assert len(pictures) >= 3 and all(Path(path).is_file() for path in pictures)
    return json.loads((out / "summary.json").read_text())


def test_the_full_demo_runs_through(tmp_path):
    few = draw_few_glyphs(tmp_path / "glyphs")
    summary = check_demo("demo", tmp_path / "demo", "full", *SHORT, f"data.root={few}")
    arms = {"finetune", "resnet18", "scratch", "all_labels", "all_labels_resnet18"}
    assert summary["top1"].keys() == arms and "wait_for_resnet18" in summary["seconds"]
    for name in arms:  # whether it is pretrained, and whether it has the labels of one face only
        config = json.loads((tmp_path / "demo" / name / "config.json").read_text())
        assert (config["init_from"] is not None) == (name in ("finetune", "all_labels"))
        assert (config["loop"]["find"] is None) == name.startswith("all_labels")


def test_the_demo_of_the_tagger_runs_through(tmp_path):
    short = [word for word in SHORT if not word.startswith("model")]
    few = draw_few_glyphs(tmp_path / "glyphs")
    summary = check_demo("demo_tagger", tmp_path / "demo", *short, f"data.root={few}")
    assert summary["sided_ap"].keys() == {"tagger", "no_map"} and 0 <= summary["tagger"]["mAP"] <= 1
    assert (tmp_path / "demo/tagger/export/wd14/selected_tags.csv").is_file()


@needs_diffusers
def test_the_demo_of_sdxl_runs_through_and_diffusers_draws_its_pictures(tmp_path):
    summary = check_demo("demo_sdxl", tmp_path / "demo", *SHORT_SDXL)
    assert summary["differences"].keys() == {"diffusers", "single_file", "kohya"}
    assert max(summary["differences"].values()) <= 3.0


def test_a_demo_leaves_other_folders_alone_and_refuses_other_words(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused = run_demo("demo", f"out={tmp_path}")
    assert refused.returncode == 1 and "holds other things than an earlier demo" in refused.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert run_demo("demo", "ful").returncode == 1
