"""/start: what may be started, the queue under kills, and the page in a browser."""

import os
import signal
import time

import pytest

import viewer.queue
from tests.support import command, make_collection
from tests.viewer.conftest import sees
from utils.errors import UserError
from utils.io.files import is_locked, write_json
from viewer.queue import Queue

# It says that it starts, and ends when it is told; Ctrl-C saves.
SCRIPT = """import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
folder = pathlib.Path(sys.argv[-1].split("=")[1])
with folder.with_name("started").open("a") as file:
    print(folder.name, file=file)
print("trains", flush=True)
try:
    while not folder.with_suffix(".end").exists():
        time.sleep(0.05)
except KeyboardInterrupt:
    print("saved")
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue whose train.py is SCRIPT; what still runs is ended."""
    monkeypatch.setattr(viewer.queue, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    for name in ("photos", "runs"):
        (tmp_path / name).mkdir()
    queue = make_queue(tmp_path)
    yield queue
    for name in "abc":
        (queue.runs / f"{name}.end").touch()
    wait(lambda: not any(map(is_locked, queue.runs.glob(".queue/*.log"))))


def make_queue(folder):
    return Queue([folder / "photos"], folder / "runs", may_start=True)


def words_of(queue, name):
    return ["train.py", f"data.root={queue.roots[0]}", f"run_dir={queue.runs}/{name}"]


def states(queue):
    return {words[-1][-1]: queue.state(name, words) for name, words in queue.act()}


def name_of(queue, letter):
    return next(name for name, words in queue.act() if words[-1][-1] == letter)


def started(queue):
    file = queue.runs / "started"
    return file.read_text().split() if file.exists() else []


def wait(is_so):
    until = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_commands_run_one_after_the_other_and_outlive_view(queue, tmp_path):
    for letter in "abc":
        queue.act("", "Add", words_of(queue, letter)), queue.act("", "Add", words_of(queue, letter))  # a double click
    wait(lambda: started(queue) == ["a"])
    queue = make_queue(tmp_path)  # view.py was killed
    assert states(queue) == {"a": "running", "b": "waiting", "c": "waiting"}
    queue.act(name_of(queue, "c"), "To the front")
    queue.act(name_of(queue, "a"), "Remove")  # nothing: it runs
    queue.act(name_of(queue, "a"), "Stop")
    assert states(queue)["a"] in ("stopping", "ended")
    wait(lambda: states(queue)["a"] == "ended" and started(queue) == ["a", "c"])
    assert queue.lines(name_of(queue, "a"))[-1] == "saved"
    queue.act(name_of(queue, "a"), "Start again")
    queue.act(name_of(queue, "b"), "Remove")
    assert states(queue) == {"c": "running", "a": "waiting"}
    processes = viewer.queue.psutil.process_iter(["cmdline"])
    process = next(each for each in processes if (each.info["cmdline"] or [])[1:] == words_of(queue, "c"))
    os.kill(process.pid, signal.SIGKILL)
    wait(lambda: queue.act() and started(queue) == ["a", "c", "a"])
    assert states(queue) == {"c": "ended", "a": "running"}


def test_a_command_that_is_not_taken_any_more_lets_others_start(queue):
    (queue.runs / ".queue").mkdir()
    write_json(queue.runs / ".queue/queue.json", [["1", ["train.py", "data.root=/gone", "run_dir=b"]]])
    queue.act("", "Add", words_of(queue, "a"))
    wait(lambda: states(queue) == {"b": "ended", "a": "running"})


@pytest.mark.parametrize("name, after", [("write_json", 0), ("write_json", 1), ("Popen", 0), ("Popen", 1)])
@pytest.mark.parametrize("ends", [False, True])
def test_a_kill_of_view_loses_nothing_and_starts_nothing_twice(queue, tmp_path, name, after, ends):
    if ends:
        (queue.runs / "a.end").touch()
    if (child := os.fork()) == 0:
        call = getattr(viewer.queue, name)

        def die(*args, **options):
            if after:
                call(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(viewer.queue, name, die)
        queue.act("", "Add", words_of(queue, "a"))
    os.waitpid(child, 0)
    if (name, after) == ("write_json", 0):  # nobody was told that it waits
        assert queue.act() == []
        return
    state = {"a": "ended" if ends else "running"}
    wait(lambda: states(queue) == state and started(queue))
    assert started(queue) == ["a"] and states(queue) == state


GOOD = [
    "train.py data.root=P/--x task=tagging run_dir=R/a", "train.py data.root=P/a=b loop.minutes=2.5 run_dir=R/a",
    "finetune_sdxl.py experiment=sdxl/lora model.path=P/$(x) data.trigger=sks data.root=P/;rm run_dir=R/a",
    'finetune_sdxl.py task.samples.prompts=["sks"] run_dir=R/a',
    "prepare.py job=labels data.root=P/é job.report=R/care/é-1", "export.py run_dir=R/a format=wd14",
    "evaluate.py run_dir=R/sweep/a calibrate=true per_image=true",
]  # fmt: skip
BAD = [
    "train.py data.root=P/.ssh", "train.py data.root=P/../x", "train.py data.root=Px", "train.py data.root=/",
    "train.py data.root=~", "train.py --x", "train.py a=b", "train.py $(x)", "train.py loop.minutes=1;ls",
    "train.py task=fcmae", "train.py data.trigger=${oc.env:HOME}", "train.py run_dir=/tmp/x",
    "train.py run_dir=R/a/../x", "train.py run_dir=R/.queue", "train.py hydra.run.dir=x", "evaluate.py data.root=P",
    "train.py data.root=P/a\nb", "train.py loop.minutes=1\n", "train.py data.root=P\0x", "sh -c",
    "-c data.root=P", "../train.py", "evaluate.py run_dir=R/../a", "export.py run_dir=R/a format=timm",
]  # fmt: skip


def test_only_words_of_the_table_are_started(queue):
    for text in GOOD + BAD:
        words = [word.replace("=P", f"={queue.roots[0]}").replace("=R", f"={queue.runs}") for word in text.split(" ")]
        if text in GOOD:
            queue.check(words)
        else:
            with pytest.raises(UserError, match="does not take"):
                queue.act("", "Add", words)
    with pytest.raises(UserError, match="view.start"):
        Queue([], queue.runs, may_start=False).act()
    assert queue.act() == []
    done = command("python", "view.py", "view.host=0.0.0.0", "view.token=a-long-random-text", "view.start=true")
    assert done.returncode == 2 and "view.start" in done.stderr


@pytest.fixture(scope="module")
def words(runs):
    make_collection(runs / "photos", broken=1)
    return [f"runs={runs}", f"data.root={runs}/photos"]


def test_from_a_folder_to_a_run_that_stops(page, address, runs):
    page.goto(f"{address}/start?folder=/etc")
    sees(page, "the page does not take")
    page.goto(address)
    names = ["000.png", "000.txt", "001.txt"]
    page.locator("input[type=file]").first.set_input_files([runs / "photos/train/A" / name for name in names])
    sees(page, "1 picture and 1 text copied, 1 refused")
    assert [file.name for file in sorted(runs.glob("pictures/*/*"))] == names[:2]
    page.get_by_role("button", name="Browse").click()
    page.get_by_role("link", name="Open this folder").click()
    page.get_by_text("an image without a sidecar: 1", exact=False).wait_for(timeout=240_000)
    page.locator("code", has_text="/care/photos-").wait_for(state="attached")  # each collection has its own report
    foresight = page.get_by_label("Train", exact=True).locator(".plan-outlook")
    foresight.get_by_text("times").wait_for(timeout=240_000)
    said = foresight.inner_text()
    page.get_by_label("minutes").first.fill("9")
    assert "which has learned nothing yet" in said and foresight.inner_text() not in (said, "Working out a plan …")
    card = page.get_by_label("Train a tagger")
    card.get_by_label("minutes").fill("2")
    card.get_by_text("show command").click()
    told = card.locator("code").filter(has_text="python train.py task=tagging").inner_text()
    assert "loop.minutes=3 run_dir=" in told
    card.get_by_role("button", name="Start").dblclick(delay=1_100)  # two names of runs
    sees(page, "reading the images, planning")
    page.context.new_page().goto(address)
    sees(page.context.pages[1], "reading the images, planning")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Start again").wait_for(timeout=240_000)
    assert told.split("run_dir=")[1].strip() in (runs / ".queue/queue.json").read_text()
    page.get_by_role("button", name="Remove").click()
    page.get_by_role("button", name="Remove").wait_for(state="detached")
