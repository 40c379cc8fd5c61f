"""README: every command in it runs, and every file that it names is there. Refusals if one is neither run nor known."""

import re
import shlex
import subprocess

import pytest

from tests.support import ROOT, command, make_collection, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
# What a training command gets on top, so that it ends in seconds; everything else stays as a reader types it.
SHORT = [
    "model=convnextv2_glyph", "model.depths=[1,1]", "model.dims=[8,16]", "augment.image_size_hw=[32,32]",
    "loop.total_steps=2", "loop.global_batch_size=8", "runtime.threads=1",
]  # fmt: skip
MAKE = ("demo", "test", "lint", "bench", "test-slow", "simd", "clean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a working folder that has the glyphs (drawn once, in the repository) and a collection named PATH."""
    path = tmp_path_factory.mktemp("readme")
    (ROOT / "collections").mkdir(exist_ok=True)
    (path / "collections").symlink_to(ROOT / "collections")
    make_collection(path / "PATH")
    return path


def test_the_readme_has_the_commands_that_are_tested_below():
    scripts = {shlex.split(line)[1] for line in COMMANDS if line.startswith("python ")}
    assert scripts == {"prepare.py", "pretrain_fcmae.py", "finetune.py", "evaluate.py", "export.py", "predict.py"}
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} == set(MAKE)
    assert len(COMMANDS) == 18


def test_every_python_command_runs_in_the_order_of_the_readme(folder):
    """Each stage takes what the one before it left; `init_from=RUN` takes the pretraining on the images in PATH."""
    for line in (line for line in COMMANDS if line.startswith("python ")):
        script, *arguments = shlex.split(line)[1:]
        if script in ("pretrain_fcmae.py", "finetune.py"):
            arguments += SHORT
        if script == "pretrain_fcmae.py" and "data.root=PATH" in arguments:
            arguments.append("run_dir=RUN")
        if script == "predict.py":
            few = folder / "few"
            few.mkdir()
            for image in sorted((ROOT / "collections/glyphs/images/STIXGeneral").glob("U+004*.png")):
                (few / image.name).symlink_to(image)
            arguments = [f"input={few}" if text.startswith("input=") else text for text in arguments]
        run(script, arguments, folder)
    assert (folder / "outputs/first/finetune/export/model.onnx").exists()
    assert len((folder / "outputs/first/predictions.csv").read_text().splitlines()) > 10
    assert (folder / "PATH/manifest.parquet").exists()
    assert len(list((folder / "outputs/sweeps/rates").iterdir())) == 2


def test_the_torchrun_command_is_the_one_that_is_tested():
    """It runs in tests/distributed/test_launch.py."""
    line = next(line for line in COMMANDS if line.startswith("torchrun"))
    source = (ROOT / "tests/distributed/test_launch.py").read_text()
    assert all(f'"{word}"' in source or word in ("torchrun", "finetune.py") for word in shlex.split(line))


@pytest.mark.parametrize("target", MAKE)
def test_every_make_target_is_there(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_demo_runs_through(tmp_path):
    """`make demo` without its installation, on two updates; the table and the summary come out whole."""
    done = command("python", "bench/demo.py", f"out={tmp_path}/demo", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("pretraining loss", "top-1, unseen face", "ONNX against PyTorch", "all stages"):
        assert words in done.stdout
    assert (tmp_path / "demo/summary.json").exists()
    assert (tmp_path / "demo/pretrain/plots/reconstructions.png").exists()


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links
