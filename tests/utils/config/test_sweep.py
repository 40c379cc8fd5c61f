"""Sweeps as processes: which jobs there are, several at once, GPUs, failures, stopping, searching; with a script of two
lines in place of a training.
"""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.config.messages import ConfigError
from utils.config.search import Search
from utils.config.sweep import parse_sweep
from utils.config.sweep_processes import run_at_once
from utils.errors import UserError
from utils.record.run_folder import write_result

# It writes what a run writes, from its own words; `wait` waits for SIGTERM and ends with status 75. With pair=true,
# jobs 1 and 2 wait for each other.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
values = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(values["run_dir"]); folder.mkdir(parents=True, exist_ok=True)
(folder / "overrides.txt").write_text("\\n".join(sys.argv[1:]) + "\\n")
(folder / "started.json").write_text(json.dumps([time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")]))
(folder / "sweep.txt").write_text(os.environ.get("ATELIER_SWEEP", ""))
if values.get("top") == "bad":
    sys.exit(3)
if values.get("top") == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if values.get("top") == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
late = time.time() + 30
while "pair" in values and values["top"] in "12" and len(list(folder.parent.glob("top=[12]/started.json"))) < 2:
    assert time.time() < late
    time.sleep(0.01)
top = float(values.get("top", 0))
(folder / "result.json").write_text(json.dumps({"metric": "m", "value": -(top - 3) ** 2, "is_lowest_best": False}))
(folder / "ended.json").write_text(json.dumps(time.time()))
(folder / "complete.json").write_text("{}")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def run(script, *words):
    return run_at_once(parse_sweep(["--multirun", *words]), script)[0]


def started(name):
    """Return {job: (when, GPU)}."""
    files = Path("outputs/sweeps").glob(f"{name}/*/started.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def test_jobs_are_all_choices_with_each_other():
    jobs = parse_sweep(["-m", "a=1,2", "b=x", "seed=range(0,2)", "sweep.name=n", "sweep.at_once=2"]).jobs()
    assert [job.arguments for job in jobs] == [
        [
            f"a={a}",
            "b=x",
            f"seed={seed}",
            "sweep.name=n",
            "sweep.at_once=2",
            f"run_dir=outputs/sweeps/n/a={a},seed={seed}",
        ]
        for a in (1, 2)
        for seed in (0, 1)
    ]
    assert parse_sweep(["a=1,2", "run_dir=here"]).jobs()[1].folder == "here/a=2"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["optim.lr=0.1,0.2", "loop.total_steps=4", "sweep.name=n"], ["lr=0.1", "lr=0.2"]),
        (["b.x=range(1,3)", "+a.y=choice(u,v)", "run_dir=here"], ["x=1,y=u", "x=1,y=v", "x=2,y=u", "x=2,y=v"]),
        (["model.name=a,b", "data.name=c,d"], [f"data.name={d},model.name={m}" for m in "ab" for d in "cd"]),
        (["seed=1,2", "data.seed=3"], ["seed=1", "seed=2"]),
        (["init_from='run','x y'"], ["init_from=run", "init_from=x_y-HASH"]),
        (["m.depths=[1,2],[3]"], ["depths=_1,2_-HASH", "depths=_3_-HASH"]),
        (["seed=1", "sweep.name=first"], ["job"]),
    ],
)
def test_a_job_is_named_by_what_is_swept(words, names):
    """The same in turn, where Hydra gives the overrides, and in a sequence of another order."""
    sweep = parse_sweep(["-m", *words])
    assert [re.sub(r"-\w{8}$", "-HASH", Path(job.folder).name) for job in sweep.jobs()] == names
    again = parse_sweep(["-m", *reversed(words)])
    assert {job.folder for job in again.jobs()} == {job.folder for job in sweep.jobs()}


def test_names_of_jobs_differ_where_characters_were_changed_or_cut():
    long = "x" * 300
    sweep = parse_sweep(["a=1,2", f"b='x/y',x_y,'x y',{long}1,{long}2,'{'日' * 200}'"])
    names = {Path(job.folder.removeprefix(sweep.base + "/")).as_posix() for job in sweep.jobs()}
    assert len(names) == 12 and "a=1,b=x_y" in names
    assert all("/" not in name and len(name.encode()) <= 255 for name in names)


def test_a_job_with_other_constants_is_not_complete(script):
    words = ["top=1,2", "sweep.name=c", "sweep.at_once=2"]
    assert run(script, *words, "n=4") == 0
    before = started("c")
    assert run(script, *words, "n=4") == 0 and started("c") == before
    assert run(script, *words, "n=8") == 0  # the run itself refuses or continues
    assert all(started("c")[job] != before[job] for job in ("top=1", "top=2"))


@pytest.mark.parametrize(
    ("words", "in_turn", "at_once"),
    [
        ([], True, 1),
        (["sweep.at_once=1"], True, 1),
        (["sweep.at_once=3"], False, 3),
        (["sweep.gpus=[2,3]"], False, 2),
        (["sweep.gpus=[0]"], False, 1),
        (["sweep.gpus=[0,1]", "sweep.at_once=4"], False, 4),
        (["sweep.trials=3"], False, 1),
    ],
)
def test_how_many_at_once(words, in_turn, at_once):
    sweep = parse_sweep(["--multirun", "a=1,2", *words])
    assert (sweep.is_in_turn, sweep.at_once) == (in_turn, at_once)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sweep.at_once=0", "sweep.at_once: must be a number of jobs, 1 or more, found 0"),
        ("sweep.gpus=0", "sweep.gpus: must be a list of GPUs such as [0,1], found 0"),
        ("sweep.gpus=[a]", "sweep.gpus: must be a list of GPUs such as [0,1], found ['a']"),
        ("sweep.trials=few", "sweep.trials: must be a number of jobs, 1 or more, found 'few'"),
    ],
)
def test_wrong_values_are_refused(word, said):
    with pytest.raises(ConfigError) as refused:
        parse_sweep(["--multirun", "a=1,2", word])
    assert refused.value.problems == [said]


def test_jobs_know_their_sweep(script):
    assert run(script, "top=1,2", "sweep.name=rates", "sweep.at_once=2") == 0
    assert [file.read_text() for file in Path("outputs/sweeps").glob("*/*/sweep.txt")] == ["rates", "rates"]


def test_jobs_run_at_once_on_the_gpus_given(script):
    assert run(script, "top=1,2,3,4", "pair=true", "sweep.name=g", "sweep.gpus=[5,7]") == 0
    found = started("g")
    assert len(found) == 4 and {gpu for _, gpu in found.values()} == {"5", "7"}
    starts = sorted(when for when, _ in found.values())
    ends = sorted(json.loads(file.read_text()) for file in Path("outputs/sweeps/g").glob("*/ended.json"))
    assert starts[2] >= ends[0] and starts[3] >= ends[1]


def test_gpus_are_numbered_among_those_that_the_sweep_sees(script, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5d1f")
    assert run(script, "top=1,2", "sweep.name=v", "sweep.gpus=[0,1]") == 0
    assert {gpu for _, gpu in started("v").values()} == {"4", "GPU-5d1f"}
    text = r"^sweep.gpus: 2 is none of the 2 GPUs of CUDA_VISIBLE_DEVICES=4, GPU-5d1f; they are numbered from 0$"
    with pytest.raises(UserError, match=text):
        run(script, "top=1,2", "sweep.name=w", "sweep.gpus=[0,2]")
    assert started("w") == {}


def test_a_job_that_fails_does_not_end_the_others_and_what_is_missing_runs_again(script, caplog):
    assert run(script, "top=1,bad,2", "sweep.name=f", "sweep.at_once=2") == 3
    before = started("f")
    assert sorted(before) == ["top=1", "top=2", "top=bad"]
    assert run(script, "top=1,bad,2,4", "sweep.name=f", "sweep.at_once=2") == 3
    after = started("f")
    assert {job for job in after if after[job] != before.get(job)} == {"top=bad", "top=4"}


def test_a_job_that_is_killed_has_failed(script):
    assert run(script, "top=1,killed,2", "sweep.name=k", "sweep.at_once=2") == 128 + 9
    assert sorted(started("k")) == ["top=1", "top=2", "top=killed"]


def test_the_disk_s_error_ends_the_sweep(script):
    Path("outputs/sweeps/d/top=1.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run(script, "top=1,2", "sweep.name=d", "sweep.at_once=2")


def test_a_stop_signal_is_passed_on_and_no_job_is_started_then(script):
    def stop():
        while "top=wait" not in started("s"):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(script, "top=wait,1,2", "sweep.name=s", "sweep.trials=null", "sweep.gpus=[0]") == 75
    thread.join()
    assert list(started("s")) == ["top=wait"]


def test_a_search_comes_near_the_best_and_goes_on_where_it_stopped(script):
    words = ["top=interval(0,10)", "sweep.name=o"]
    assert run(script, *words, "sweep.trials=4") == 0
    assert len(started("o")) == 4
    assert run(script, *words, "sweep.trials=14") == 0
    tops = [float(re.search(r"top=([\d.]+)", job).group(1)) for job in started("o")]
    assert len(tops) == 14 and min(abs(top - 3) for top in tops) < 1.5


def test_a_search_is_repeatable_and_draws_anew_where_it_goes_on(script, monkeypatch, tmp_path):
    def search(folder, *trials):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for number in trials:
            assert run(script, "top=interval(0,10)", "sweep.name=r", f"sweep.trials={number}") == 0
        return set(started("r"))

    assert search("first", 3) == search("second", 3)
    assert len(search("third", 3, 6)) == 6


def test_a_trial_that_was_killed_is_made_again_with_its_values(script):
    sweep = parse_sweep(["--multirun", "top=interval(0,10)", "n=range(1,9)", "c=x,y", "sweep.name=k", "sweep.trials=2"])
    job = Search(sweep).next_job()
    assert Search(sweep).next_job() == job
    assert re.fullmatch(r"top=[\d.e-]+ n=[1-8] c=[xy] .*", " ".join(job.words))


def test_trials_of_the_same_values_are_one_job_at_a_time(script):
    search = Search(parse_sweep(["--multirun", "c=x,y", "sweep.name=k", "sweep.trials=5"]))
    jobs = [search.next_job(), search.next_job()]
    assert {job.folder for job in jobs} == {"outputs/sweeps/k/c=x", "outputs/sweeps/k/c=y"}
    assert search.next_job() is None  # the other three are those two again
    for job in jobs:
        write_result(Path(job.folder), "m", SimpleNamespace(value=0.5, step=1), is_lowest_best=False)
        search.tell(job)
    assert [(trial.value, trial.state.name) for trial in search._study.trials] == [(0.5, "COMPLETE")] * 5


@pytest.mark.parametrize(("is_lowest_best", "value"), [(True, -0.5), (False, 0.5), (None, None)])
def test_a_search_is_told_what_to_maximise(script, is_lowest_best, value):
    search = Search(parse_sweep(["--multirun", "top=interval(0,10)", "sweep.trials=2"]))
    job = search.next_job()
    Path(job.folder).mkdir(parents=True)
    if value is not None:
        write_result(Path(job.folder), "m", SimpleNamespace(value=0.5, step=1), is_lowest_best=is_lowest_best)
    search.tell(job)
    (trial,) = search._study.trials
    assert (trial.value, trial.state.name) == (value, "FAIL" if value is None else "COMPLETE")
    assert search._study.direction.name == "MAXIMIZE"


def test_a_search_without_a_range_is_refused(script):
    with pytest.raises(UserError, match=r"^sweep.trials: nothing is swept; add a range"):
        run(script, "top=1", "sweep.trials=2")


def test_torchrun_is_refused(script, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^sweep.at_once: jobs at once are processes of their own"):
        run(script, "top=1,2", "sweep.at_once=2")
