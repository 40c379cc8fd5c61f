"""workshop.py on a recipe of two tiny commands: order, kills, repetition, a full disk, its page, and wrong recipes."""

import os
import re
import signal
import time

import pytest

from tests.in_process import configure, load_command, make_images, run_command, working_in
from tests.support import refuses, start
from utils.io.files import read_json
from workshop import Stage

# Notes its name in order.txt, meets the trouble that the test has written for it, once, and leaves what it names.
STUB = """
import os, sys, time
from pathlib import Path
name, run, home = sys.argv[1], Path(sys.argv[2]), Path(__file__).parent
with open(home / "order.txt", "a") as file:
    file.write(f"{name} ")
trouble = home / f"trouble_{name}"
if trouble.exists():
    what = trouble.read_text()
    trouble.unlink()
    if what == "killed":
        os.kill(os.getpid(), 9)
    if what == "hangs":
        (home / "pid.txt").write_text(str(os.getpid()))
        time.sleep(600)
    try:
        (run / "large").write_bytes(bytes(2**22))
    except OSError as error:
        (run / "large").unlink()
        sys.exit(f"{name}.py: {error}")
from PIL import Image
Image.new("RGB", (8, 8), name).save(run / f"{name}.png")
(run / name).mkdir(exist_ok=True)
(run / name / "result.json").write_text('{"metric": "top1", "value": 0.5}')
"""


def read_pictures(page):
    """Return the names of a page's pictures."""
    return re.findall(r'<img alt="([^"]*)"', page)


@pytest.fixture
def recipe(tmp_path):
    """Return the stages red and blue, and write their script; `home` is beside it."""
    (tmp_path / "it is a stub.py").write_text(STUB)
    script = f"'{tmp_path}/it is a stub.py'"
    make_images(tmp_path / "Anna's images")
    return {
        name: Stage(command=f"{script} {name} $RUN $DATA", leaves=[f"{name}/result.json", f"{name}.png"])
        for name in ("red", "blue")
    }


def work(stages, folder, *words, run_dir="run"):
    """Run the workshop with other stages; returns what it says."""
    config, job = configure("workshop", [f"data.root={folder}/Anna's images", f"run_dir={run_dir}", *words])
    with working_in(folder):
        return load_command("workshop").main(config.model_copy(update={"stages": stages}), job)


def test_a_killed_workshop_goes_on_and_repeats_no_finished_stage_and_keeps_none_that_is_outdated(recipe, tmp_path):
    (tmp_path / "trouble_blue").write_text("killed")
    with pytest.raises(SystemExit) as ended:
        work(recipe, tmp_path)
    assert ended.value.code == 137 and not (tmp_path / "run/report.html").exists()
    order = lambda: (tmp_path / "order.txt").read_text().split()  # noqa: E731
    assert order() == ["red", "blue"]
    assert work(recipe, tmp_path, "dry_run=true") == "dry run: 1 of 2 stages are left"
    assert work(recipe, tmp_path).startswith("2 stages; ") and order()[2:] == ["blue"]
    work(recipe, tmp_path)
    assert len(order()) == 3
    (tmp_path / "run/blue.png").unlink()
    work(recipe, tmp_path)
    assert order()[3:] == ["blue"]
    other = Stage(command=f"{recipe['blue'].command} more", leaves=recipe["blue"].leaves)
    with refuses(r"^run_dir: .* blue of another stages\.blue\.command"):
        work({**recipe, "blue": other}, tmp_path)
    work({**recipe, "green": other}, tmp_path)
    assert order()[4:] == ["blue"]
    (tmp_path / "Anna's images/train/A/000.txt").write_text("another")
    with refuses("^run_dir: .* other images"):
        work(recipe, tmp_path)
    work(recipe, tmp_path, "data.on_bad_sidecar=skip", run_dir="other")  # reaches both commands
    commands = [stage["command"] for stage in read_json(tmp_path / "other/stages.json").values()]
    assert all("data.on_bad_sidecar=skip" in command for command in commands)


def test_the_page_shows_the_seconds_pictures_figures_and_commands(recipe, tmp_path):
    work(recipe, tmp_path)
    page = (tmp_path / "run/report.html").read_text()
    assert read_pictures(page) == ["red: red.png", "blue: blue.png"]
    assert "all stages, seconds" in page and "top1 0.5" in page and f"data.root={tmp_path}/Anna" in page
    assert {*read_json(tmp_path / "run/stages.json")["red"]} == {"command", "images", "seconds"}


def test_a_full_disk_shows_the_message_of_the_stage_and_loses_nothing(recipe, small_disk, tmp_path, capfd):
    (tmp_path / "trouble_blue").write_text("full")
    with pytest.raises(SystemExit) as ended:
        work(recipe, tmp_path, run_dir=small_disk / "run")
    assert ended.value.code == 1 and "blue.py: [Errno 28] No space left" in capfd.readouterr().err
    assert (small_disk / "run/red.png").exists()
    work(recipe, tmp_path, run_dir=small_disk / "run")
    assert (tmp_path / "order.txt").read_text().split() == ["red", "blue", "blue"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_stage_ends_with_the_workshop(number, status, tmp_path):
    make_images(tmp_path / "images")
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "trouble_red").write_text("hangs")
    words = [f"~stages.{name}" for name in configure("workshop", ["data.root=x"])[0].stages if name != "pretrain"]
    words += [f"stages.pretrain.command='{tmp_path}/stub.py red $RUN'", "data.root=images", "run_dir=run"]
    started = start("workshop.py", words, tmp_path)
    while not (tmp_path / "pid.txt").exists() or not (pid := (tmp_path / "pid.txt").read_text()):
        assert started.processes[0].is_alive(), started.output
        time.sleep(0.02)
    with refuses("^run_dir: another workshop"):
        work({"red": Stage(command="x.py", leaves=["x"])}, tmp_path, "data.root=images")
    started.signal(number)
    assert started.wait() == [status]
    for _ in range(500):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.02)
    raise AssertionError("the stage lives on")


def test_what_a_recipe_has_wrong(recipe, tmp_path, monkeypatch, capfd):
    wrong = {"red": recipe["red"].model_copy(update={"leaves": ["red.jpg"]})}
    with refuses(r"^stages\.red\.leaves: red\.jpg "):
        work(wrong, tmp_path)
    (tmp_path / "empty").mkdir()
    for words, key in (
        (["data.root=empty"], "data.root: "),
        (["data.root=nowhere"], "data.root: "),
        (["data.root=empty", "stages.pretran.command=x.py"], "stages.pretran: unknown key"),
        (["data.root=empty", 'stages.sdxl.command="x.py \\"y"'], "stages.sdxl.command: "),
    ):
        assert run_command("workshop", words, tmp_path, monkeypatch) == 2
        assert key in capfd.readouterr().err
