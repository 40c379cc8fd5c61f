"""What a run says of waiting for data: the share, the metrics, the settings that help."""

import json

import engine.run
from tests.in_process import SHORT, SMALL_MODEL, make_images, run


def test_a_run_records_its_waits_and_caches_and_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.run, "MUCH_WAITING", 0.0)
    root = make_images(tmp_path / "images")
    command = [*SMALL_MODEL, *SHORT, "data=image_folder", f"data.root={root}", "loop.total_steps=6", "run_dir=run"]
    run("finetune", command, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    rates = [row["data/l1_hit_rate"] for row in rows]
    assert rates == sorted(rates) and 0 < rates[-1] < 1
    assert all(row["data/l1_gib"] > 0 and row["data/wait_sec"] >= 0 for row in rows) and rows[-1]["data/wait_sec"] > 0
    said = (tmp_path / "run/log.txt").read_text()
    assert "was a wait for data: " in said
