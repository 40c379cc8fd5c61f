"""`begin` says what a system lacks, lets the C library keep freed memory, and counts what others use."""

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from tests.in_process import TINY, run
from tests.support import ROOT, command, refuses
from utils.start import begin

PROGRAM = """
import resource, torch
from utils.start import begin
begin(None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("settings, keeps", [({}, True), ({"MALLOC_MMAP_MAX_": "1000"}, False)])
def test_a_block_in_the_place_of_a_freed_one_costs_few_page_faults(settings, keeps):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | settings, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) < 20 * 2**26 / resource.getpagesize() / 2) is keeps


SPIN = "import time\nends = time.monotonic() + 20\nwhile time.monotonic() < ends: pass"
TELL = "import time, utils.start as own\nown.begin(None)\ntime.sleep(2)\nprint(own.cores_of_others())"


def test_cores_that_others_use_are_counted():
    core = str(min(os.sched_getaffinity(0)))
    with subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", SPIN]) as spinning:
        found = command("taskset", "-c", core, "python", "-c", TELL)
        spinning.kill()
    assert 0.5 < float(found.stdout) <= 1.1


@pytest.mark.parametrize(
    "before, options, words",
    [
        ("import os, sys\ndel os.sched_getaffinity\nsys.platform = 'win32'", [], ["Linux", "WSL"]),
        ("", ["-S"], [sys.executable, "make install", ".venv/bin/activate"]),  # without site-packages
        ("import sys\nsys.version_info, sys.version = (3, 10, 1), '3.10.1 (main)'", [], ["3.11", "3.10.1"]),
    ],
    ids=["Windows", "no packages", "an old Python"],
)
def test_a_system_that_cannot_train_is_told_what_is_needed(before, options, words):
    lines = f"{before}\nimport runpy, sys\nsys.argv = ['train.py']\nrunpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, *options, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)


def test_macos_trains_on_the_cpu_and_says_what_is_missing(tmp_path, collection, monkeypatch, capsys):
    """Without what Linux alone has; no test has run on a Mac."""
    import torchvision  # noqa: F401  loads its library before CDLL is replaced

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # `begin` sets it
    begin(sys.modules["__main__"].__doc__)
    said = capsys.readouterr().err
    assert all(word in said for word in ("macOS", "CPU", "Linux")) and said.count("\n") == 1
    words = [*TINY, f"data.root={collection}", "runtime=auto", "data.cache.memory_gib=auto"]
    run("train", [*words, "run_dir=run"], tmp_path)
    assert (tmp_path / "run/weights/last_weights.safetensors").is_file()
    with refuses("runtime.workers"):
        run("train", [*words, "run_dir=other", "runtime.workers=2"], tmp_path)


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_names_are_utf8_in_every_locale(tmp_path, locale):
    lines = ['"""Say names."""', "import os, sys", "from utils.start import begin", "begin(__doc__)"]
    (tmp_path / "say.py").write_text("\n".join([*lines, "print(*os.listdir(), sys.argv)"]))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/Föhn").touch()
    done = subprocess.run(
        [sys.executable, "../say.py", "a=ö"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **locale}, cwd=tmp_path / "here", capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == "Föhn ['../say.py', 'a=ö']\n"
