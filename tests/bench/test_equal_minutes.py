"""bench/minutes.py, with commands that only write what a run would: which runs it makes, and what it says of them."""

import json
import sys
from collections import Counter

import pytest

from bench import minutes
from tests.support import make_collection

LINE = "Train: {} [   {}/4 (100%)]  Loss: 3.24 (3.24)  Time: 0.5s,  128.0/s  (0.500s,  128.0/s)  LR: 1.0e-06\n"


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Return a function that types the command; it returns its status, its text, and the trials that it ran."""
    make_collection(tmp_path / "collections/a", per_class=1, validation=1)
    made = []

    def run_on(core, command, log):
        words, run = list(map(str, command)), log.parent / "run"
        made.append(log.parent.name)
        run.mkdir()
        log.touch()
        if words[1] == "train.py":
            (run / "metrics.jsonl").write_text(json.dumps({"kind": "evaluate", "step": 7, "top1": 0.8}) + "\n")
        elif words[1].endswith("timm.py"):
            top1 = 50 + int(words[words.index("--img-size") + 1]) / 16
            (run / "summary.csv").write_text(f"epoch,eval_top1\n9,{top1}\n")
            last = int(words[words.index("--train-batches-per-epoch") + 1]) - 1
            log.write_text("".join(LINE.format(epoch, update) for epoch in range(10) for update in (0, last)))
        else:
            steps = json.loads(words[-1])["steps"]
            log.write_text("a warning\n" + json.dumps({"top1": 0.5, "steps": steps, "train_sec": steps / 4}) + "\n")
        return 20.0, 10.0  # of wall and of CPU

    def type_command(*more):
        made.clear()
        places = [f"collections={tmp_path / 'collections'}", f"journal={tmp_path / 'found.jsonl'}"]
        monkeypatch.setattr(sys, "argv", ["minutes.py", "names=a", "minutes=0.1", "seeds=2", *places, *more])
        with pytest.raises(SystemExit) as ended:
            minutes.main()
        return ended.value.code, capsys.readouterr(), list(made)

    monkeypatch.setattr(minutes, "run_on", run_on)
    return type_command


RIVALS = ["timm_script=timm.py", "fastai_python=python"]


def test_the_best_of_a_rivals_trials_runs_with_all_seeds_and_a_killed_bench_goes_on(bench, tmp_path):
    status, said, made = bench("cores=3,4", *RIVALS)
    assert status == 0 and "core busy?" in said.err
    assert Counter(name.split("-")[0] for name in made if "-0min-" not in name) == {"ours": 2, "timm": 17, "fastai": 13}
    assert sum("-0min-" in name for name in made) >= 8 + 6  # a calibration for each network, size and augmentation
    head, fastai, ours, timm, _ = (line.split() for line in said.out.splitlines())
    assert timm[2:7] == ["timm", "0.5400", "(0.5400", "to", "0.5400)"] and timm[7:9] == ["0.4348", "20"]
    assert (
        timm[-5:] == ["16", "0.001", "resnet18", "mild", "64"] and fastai[8] == "50"
    )  # 6 s of CPU at 0.25 and 0.125 s a step

    journal = tmp_path / "found.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-3]) + '{"trial": "tor')
    assert len(bench("cores=3,4", *RIVALS)[2]) == 3 and bench(*RIVALS)[2] == bench("table")[2] == []


def test_a_screening_leaves_four_trials_for_the_whole_time(bench):
    _, said, made = bench("screen=0.05", "arms=timm", *RIVALS)
    counted = Counter(name.split("-")[2] for name in made)
    assert counted == {"0min": 8, "0.05min": 16, "0.1min": 4 + 1} and said.out.count("timm") == 2


@pytest.mark.parametrize("words", [["arms=timm"], ["arms=jax"], ["names=b"], ["mins=2"]])
def test_words_that_cannot_be_are_refused(bench, words):
    status, _, made = bench(*words)
    assert words[0].split("=")[0] in status and made == []
