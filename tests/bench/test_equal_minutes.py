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
    """Return a function that types the command; it returns its text, and the trials that it ran."""
    make_collection(tmp_path / "collections/a", per_class=1, validation=1)
    made = []

    def run_on(core, command, log):
        words, run = list(map(str, command)), log.parent / "run"
        made.append(log.parent.name)
        run.mkdir()
        if words[1] == "train.py":
            (run / "metrics.jsonl").write_text(json.dumps({"kind": "evaluate", "step": 7, "top1": 0.8}) + "\n")
        else:
            top1 = 50 + int(words[words.index("--img-size") + 1]) / 16
            (run / "summary.csv").write_text(f"epoch,eval_top1\n9,{top1}\n")
            last = int(words[words.index("--train-batches-per-epoch") + 1]) - 1
            log.write_text("".join(LINE.format(epoch, update) for epoch in range(10) for update in (0, last)))
        return 20.0, 10.0  # of wall and of CPU

    def type_command(*more):
        made.clear()
        places = [f"collections={tmp_path / 'collections'}", f"journal={tmp_path / 'found.jsonl'}"]
        monkeypatch.setattr(sys, "argv", ["minutes.py", "names=a", "minutes=0.2", "seeds=2", *places, *more])
        minutes.main()
        return capsys.readouterr(), list(made)

    monkeypatch.setattr(minutes, "run_on", run_on)
    return type_command


def test_the_best_of_a_rivals_trials_runs_with_all_seeds_and_a_killed_bench_goes_on(bench, tmp_path):
    said, made = bench("timm_script=timm.py")
    assert "core busy?" in said.err
    counted = Counter(tuple(name.split("-")[i] for i in (0, 2)) for name in made)
    # A calibration for each network, size and augmentation; a quarter of the time for all, then the best four.
    stages = {("timm", "0min"): 8, ("timm", "0.05min"): 16, ("timm", "0.2min"): 4 + 1}
    assert counted == {("ours", "0.2min"): 2, **stages}
    _, _, ours, timm, _ = (line.split() for line in said.out.splitlines())
    assert ours[2:7] == ["ours", "0.8000", "(0.8000", "to", "0.8000)"]
    assert timm[2:9] == ["timm", "0.5400", "(0.5400", "to", "0.5400)", "0.4348", "50"]  # 12 s at 0.25 s of CPU a step
    assert timm[-4:] == ["0.001", "resnet18", "mild", "64"]

    journal = tmp_path / "found.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-3]) + '{"trial": "tor')
    assert len(bench("timm_script=timm.py")[1]) == 3
    assert bench("timm_script=timm.py")[1] == []
