"""CPU seconds of commands that answer at once, beside the imports of timm's train.py, and what train.py imports.

    OMP_NUM_THREADS=1 python -m bench.start repeats=3

A busy machine slows both sides of a round. The lowest seconds of all rounds count.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from utils.config.help import ROOT

TIMM = ["-c", "import timm, torch, torchvision"]
STEPS = "loop.total_steps=3 loop.batch_size=16 augment.image_size_hw=[64,64] runtime.device=cpu runtime.workers=0"
COMMANDS = {
    "refusal: unknown key": "train.py data.rot=images",
    "refusal: bad value": "train.py loop.batch_size=many",
    "refusal: no folder": "train.py data.root=none",
    "check of 240 images": "prepare.py job=check data.root=images",
    "three steps": f"train.py data.root=images run_dir=run {STEPS}",
    "100 images, ONNX": "predict.py weights=model/model.onnx input=images/*/1??.jpg output=out.csv existing=overwrite",
}
EXPORT = "export.py format=onnx run_dir=run output=model"
WINGS = ("sdxl/", "vae", "memory", "judg")

# In a process of its own: run the script, note the frames that lead to the loss, and list what was imported.
_TRACE = """
import json, runpy, sys
_, sys.path[0], out, *sys.argv = sys.argv
root, frames = sys.path[0] + "/", []
def watch(frame, event, _):
    if event == "call" and frame.f_code.co_qualname == "ClassificationTask.forward" and not frames:
        sys.setprofile(None)
        while frame:
            frames.append(frame.f_code.co_filename)
            frame = frame.f_back
sys.setprofile(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    ours = lambda names: [n.removeprefix(root) for n in names if n.startswith(root) and "/." not in n]
    json.dump({"files": sorted(ours(files)), "frames": ours(frames)}, open(out, "w"))
"""


def cpu_seconds(words: list[str], folder: Path) -> float:
    """Run Python with words in a folder; return the seconds of user and system time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def script_words(command: str) -> list[str]:
    """Return the words of a command, with the script's path."""
    return f"{ROOT}/{command}".split()


def describe_core(folder: Path) -> str:
    """Return the files and lines that three steps of train.py import, and the frames from the script to the loss."""
    out = folder / "core.json"
    words = script_words(COMMANDS["three steps"].replace("run_dir=run", "run_dir=traced"))
    subprocess.run([sys.executable, "-c", _TRACE, str(ROOT), str(out), *words], cwd=folder, capture_output=True)
    found = json.loads(out.read_text())
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in found["files"])
    wings = sum(any(wing in name for wing in WINGS) for name in found["files"])
    return f"{len(found['files'])} files, {lines:,} lines, {wings} of wings, {len(found['frames'])} frames to the loss"


def main(repeats: int) -> None:
    """Print the table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.default_rng(0)
        for number in range(240):
            file = folder / "images" / "abc"[number % 3] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(file)
        sys.stdout.write(f"train.py: {describe_core(folder)}\n")
        seconds = {title: [] for title in ("timm's imports", *COMMANDS)}
        for _ in range(repeats):
            seconds["timm's imports"].append(cpu_seconds(TIMM, folder))
            shutil.rmtree(folder / "run", ignore_errors=True)  # a finished run would only be read
            for title, command in COMMANDS.items():
                seconds[title].append(cpu_seconds(script_words(command), folder))
                if title == "three steps" and not (folder / "model").exists():
                    cpu_seconds(script_words(EXPORT), folder)
        for title, found in seconds.items():
            sys.stdout.write(f"{title:24} {min(found):6.2f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("repeats=")) if sys.argv[1:] else 3)
