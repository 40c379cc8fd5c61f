"""bench/gpu.py with parts that only print: their rows and limits."""

import importlib

import pytest
import torch

from bench.gpu import PARTS, Journal, Part, read_tests, run_parts

FACTS = {"device": "H200", "torch": "2.11", "commit": "new"}


def part(code, limit_sec=60.0, **read):
    return Part(["-c", f"import time; {code}"], limit_sec, **read)


GOOD = part("""print('{"figure": 0.5, "spread": [0.4, 0.6]}')""")


def states(journal):
    return [(row["part"], row["state"]) for row in journal.rows()]


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


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_a_part_measures_one_setting_of_a_bench(name, monkeypatch):
    if "SDXL" in name:
        pytest.importorskip("diffusers", reason="make install-sdxl")
    script, word, text = PARTS[name].words
    bench = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(bench, "missing_for_compile", lambda device: None, raising=False)
    settings = [setting for setting, _ in bench.settings(torch.device("cuda"), False)]
    assert word == "rows" and len([setting for setting in settings if text in setting]) == 1
