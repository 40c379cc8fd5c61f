"""bench/gpu.py with parts that only print: their order, rows and limits."""

import json
import sys

import pytest
import torch

from bench import gpu
from bench.gpu import PARTS, Journal, Part, read_tests, run_parts

FACTS = {"device": "H200", "torch": "2.11", "commit": "new"}


def part(code, limit_sec=60.0, **read):
    return Part(["-c", f"import time; {code}"], limit_sec, **read)


GOOD = part("""print('{"figure": 0.5, "spread": [0.4, 0.6]}')""")


def test_what_a_device_lacks_comes_first_and_then_the_oldest_whatever_a_kill_has_torn(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl", FACTS)
    rows = [  # part, device, commit, date
        ("new", "H200", "new", "3"), ("old", "H200", "new", "2"),
        ("earlier", "H200", "old", "1"), ("before", "H200", "old", "0"), ("never", "A100", "new", "4"),
    ]  # fmt: skip
    lines = [dict(zip(("part", "device", "commit", "date"), row)) for row in rows]
    journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"part": "never", "sta')
    names = ["new", "earlier", "worth", "never", "before", "old"]
    assert journal.order(names) == ["worth", "never", "before", "earlier", "old", "new"]
    journal.add({"part": "never"})
    assert [row["part"] for row in journal.rows()] == [*(part for part, *_ in rows), "never"]


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
    assert [(row["part"], row["state"]) for row in journal.rows()] == [
        ("hangs", "measured"), ("hangs", "cut off"), ("fails", "failed"), ("says nothing", "failed"),
        ("tests", "measured"), ("good", "measured"),
    ]  # fmt: skip
    rows = {row["part"]: row for row in journal.rows()}
    assert "out of memory" in rows["fails"]["error"] and rows["tests"]["figure"] == 7
    assert rows["good"]["spread"] == [0.4, 0.6] and FACTS.items() <= rows["good"].items()
    assert "long: not begun" in capsys.readouterr().out


def test_no_part_takes_more_than_four_minutes_and_the_first_four_take_eight():
    limits = [part.limit_sec for part in PARTS.values()]
    assert max(limits) <= 240 and sum(limits[:4]) <= 480 and sum(limits) <= 2700


@pytest.mark.parametrize("words, said", [(["hours=1"], "hours"), ([], "no GPU")])
def test_a_word_or_a_machine_that_cannot_be_is_refused(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=said):
        gpu.main()
