"""bench/gpu.py with parts that only print: their order, rows, limits, and kills at any time."""

import importlib
import json
import random
import signal
import sys
import time

import pytest
import torch

from bench import gpu
from bench.gpu import PARTS, Journal, Part, read_tests, run_parts
from tests.support import start

FACTS = {"device": "H200", "torch": "2.11", "commit": "new"}


def part(code, limit_sec=60.0, **read):
    return Part(["-c", f"import time; {code}"], limit_sec, **read)


GOOD = part("""print('{"figure": 0.5, "spread": [0.4, 0.6]}')""")


def states(journal):
    return [(row["part"], row["state"]) for row in journal.rows()]


def test_what_a_device_lacks_comes_first_and_then_the_oldest(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl", FACTS)
    rows = [  # part, device, commit, date
        ("new", "H200", "new", "3"), ("old", "H200", "new", "2"),
        ("earlier", "H200", "old", "1"), ("before", "H200", "old", "0"), ("never", "A100", "new", "4"),
    ]  # fmt: skip
    lines = [dict(zip(("part", "device", "commit", "date"), row)) for row in rows]
    journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["new", "earlier", "worth", "never", "before", "old"]
    assert journal.order(names) == ["worth", "never", "before", "earlier", "old", "new"]


def test_a_part_that_hangs_or_fails_loses_only_itself(tmp_path, capsys):
    journal = Journal(tmp_path / "gpu.jsonl", FACTS)
    hangs = part("""print('{"figure": 1}', flush=True); time.sleep(600)""", 1.0)
    parts = {
        "hangs": hangs,
        "fails": part("raise SystemExit('out of memory')"),
        "says nothing": part("pass"),
        "long": part("pass", 1e6),
        "tests": part("print('== 2 failed, 7 passed in 3.1s ==')", read=read_tests),
        "good": GOOD,
    }
    assert run_parts(parts, journal, 1000) == ["hangs", "fails", "says nothing"]
    assert states(journal) == [
        ("hangs", "measured"), ("hangs", "cut off"), ("fails", "failed"), ("says nothing", "failed"),
        ("tests", "measured"), ("good", "measured"),
    ]  # fmt: skip
    rows = {row["part"]: row for row in journal.rows()}
    assert "out of memory" in rows["fails"]["error"] and rows["tests"]["figure"] == 7
    assert rows["good"]["spread"] == [0.4, 0.6] and FACTS.items() <= rows["good"].items()
    assert "long: not begun" in capsys.readouterr().out


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.bench.test_gpu import FACTS, part
from bench.gpu import Journal, run_parts
slow = part("time.sleep(0.2); print('{{\\"figure\\": 1}}', flush=True); time.sleep(0.1)")
run_parts(dict.fromkeys("abcdef", slow), Journal(Path("gpu.jsonl"), FACTS), 1000)
"""


def test_a_killed_command_goes_on_and_keeps_each_row(tmp_path):
    script = tmp_path / "stub.py"
    script.write_text(SCRIPT.format(root=str(gpu.ROOT)))
    journal = Journal(tmp_path / "gpu.jsonl", FACTS)
    draw = random.Random(0)
    kept = []
    for _ in range(4):
        started = start(str(script), [], tmp_path)
        deadline = time.monotonic() + 60
        while states(journal) == kept and started.processes[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        started.signal(signal.SIGKILL)
        started.wait()
        assert states(journal)[: len(kept)] == kept
        kept = states(journal)
    with journal.path.open("a") as file:
        file.write('{"part": "f", "sta')  # a row that was being written
    assert start(str(script), [], tmp_path).wait() == [0]
    found = states(journal)
    assert {name for name, _ in found} == set("abcdef")
    assert {name for name, _ in found[:6]} == set("abcdef")  # what the journal lacked came before a second figure


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_a_part_measures_one_setting_of_a_bench(name, monkeypatch):
    if "SDXL" in name:
        pytest.importorskip("diffusers", reason="make install-sdxl")
    script, word, text = PARTS[name].words
    bench = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(bench, "missing_for_compile", lambda device: None, raising=False)
    settings = [setting for setting, _ in bench.settings(torch.device("cuda"), False)]
    assert word == "rows" and len([setting for setting in settings if text in setting]) == 1


@pytest.mark.parametrize(("words", "said"), [(["hours=1"], "hours"), ([], "no GPU")])
def test_a_word_or_a_machine_that_cannot_be_is_refused(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=said):
        gpu.main()
