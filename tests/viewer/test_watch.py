"""Alerts: when they are raised and to whom they are told; sweeps, pins and alerts in a browser."""

import os
import sys
import time

import httpx
import pytest

from tests.utils.record.test_curves import line
from tests.utils.record.test_run_index import make_run, said
from tests.viewer.conftest import HOSTILE
from utils.io.files import file_lock, write_json
from utils.record.run_index import RunIndex
from viewer.config import AlertsConfig
from viewer.watch import RULES, Watch

LIMITS = {"disk_gib": 0, "command": None, "webhook": None}
KEEP = [sys.executable, "-c", "import sys; open('told.txt', 'a').write(sys.stdin.read() + '\\n')"]


def train_rows(rates, last_loss=1.0):
    losses = [1.0] * (len(rates) - 1) + [last_loss]
    return "".join(
        line(step, epoch=step / 9, loss=loss, images_per_sec=rate)
        for step, (rate, loss) in enumerate(zip(rates, losses))
    )


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Return a function that makes a watch over runs, with limits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return lambda **limits: Watch(RunIndex([tmp_path / "runs"]), AlertsConfig(**LIMITS | limits))


def alerts_of(watch):
    watch.check()
    return [alert for _, alert in watch.raised]


@pytest.mark.parametrize(("rows", "disk_gib", "quiet_sec", "raised"), [
    (train_rows([9.0] * 9), 0, 1_000, []),
    (train_rows([9.0] * 9, last_loss=None), 0, 0, [0]),
    (train_rows([9.0] * 9 + [4.0] * 3), 0, 0, [1]),
    (train_rows([9.0] * 9 + [4.0]), 0, 0, []),
    (train_rows([1.0] * 2 + [0.1] * 3), 0, 0, []),
    ("", 1e9, 0, [2]),
    ("", 0, 2_000, [3]),
])  # fmt: skip
def test_what_is_wrong_with_a_run_that_trains(rows, disk_gib, quiet_sec, raised, watch, tmp_path):
    run = make_run(tmp_path / "runs/run", progress_json=said("running"), metrics_jsonl=rows)
    os.utime(run / "progress.json", (time.time() - quiet_sec,) * 2)
    with file_lock(run / ".lock", ""):
        watch = watch(disk_gib=disk_gib)
        assert alerts_of(watch) == [[*RULES][number] for number in raised]
    assert alerts_of(watch) == []  # it was dead before this check began


def test_an_alert_is_told_once_until_it_clears(watch, tmp_path):
    watch = watch(command=KEEP)
    run = make_run(tmp_path / "runs/$(touch x);`touch x`\n<b>", progress_json=said("running"))
    with file_lock(run / ".lock", ""):
        assert alerts_of(watch) == []
    for state in ("failed", "failed", "finished", "failed"):
        (run / "progress.json").write_text(said(state))
        assert alerts_of(watch) == ([] if state == "finished" else ["ended without finishing"])
    assert (tmp_path / "told.txt").read_text().splitlines() == [
        r"runs/$(touch x);`touch x`\n<b>: ended without finishing"
    ] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs", "told.txt"]


def test_a_webhook_is_posted_to_and_failures_are_said(watch, tmp_path, monkeypatch):
    posted = []

    def post(url, json, timeout):
        posted.append((url, json))
        return httpx.Response(200 if len(posted) == 1 else 500, request=httpx.Request("POST", url))

    monkeypatch.setattr(httpx, "post", post)
    watch = watch(command=["no-such-program"], webhook="http://hook/secret-path")
    for number, run in enumerate("ab", start=1):
        make_run(tmp_path / "runs" / run, progress_json=said("failed"))
        watch.check()
        assert posted[number - 1 :] == [("http://hook/secret-path", {"text": f"runs/{run}: ended without finishing"})]
        assert "no-such-program" in watch.failures["command"] and ("webhook" in watch.failures) == (number == 2)
    assert "500" in watch.failures["webhook"] and "secret-path" not in watch.failures["webhook"]


def test_the_rows_of_this_machine(watch, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'H100, 35 %, 10 MiB, 80 MiB\nA30, [N/A], 1 MiB, 2 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    rows = watch().rows()
    assert [row["what"] for row in rows] == ["GPU H100", "GPU A30", "CPU", "memory", f"disk of {tmp_path}/runs"]
    assert rows[0]["text"] == "35 % busy, memory 10 MiB, 80 MiB" and [row["share"] for row in rows[:2]] == [0.35, 0.0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep of three jobs, and a run that trains and whose loss is not finite."""
    folder, name = tmp_path_factory.mktemp("watched"), HOSTILE.replace("/", "")
    for rate, value in ((1, 0.25), (2, 0.75), (3, None)):
        run = make_run(folder / f"rates/lr={rate}", complete_json="{}", overrides_txt=f"optim.lr={rate}\n{HOSTILE}=1\n")
        if value is not None:
            write_json(run / "result.json", {"metric": 1, "value": value, "step": 4, "is_lowest_best": False})
    rows = train_rows([9.0] * 9, last_loss=None)
    run = make_run(folder / name, progress_json=said("running"), metrics_jsonl=rows)
    make_run(folder / "other")
    with file_lock(run / ".lock", ""):
        yield folder


@pytest.fixture(scope="module")
def words(runs):
    """This machine's disk may be full."""
    return [f"runs={runs}", "view.alerts.command=[no-such-program]", "view.alerts.disk_gib=0"]


def test_sweeps_pins_and_alerts_in_a_browser(page, address, runs):
    page.goto(address)
    page.get_by_text("3 of 3 runs").wait_for()
    assert page.locator("tbody tr").count() == 3 and not page.get_by_role("link", name="lr=2").is_visible()
    page.get_by_role("link", name="Watch ⚠ 1").wait_for()
    page.get_by_text("rates", exact=True).click()
    page.get_by_role("link", name="lr=2").wait_for()
    page.get_by_label("pin other").click()
    page.get_by_label("pin other").and_(page.locator("[aria-pressed=true]")).wait_for()
    jobs = page.locator("td details a").all_inner_texts()  # the sweep is still open
    assert jobs == ["lr=2", "lr=1", "lr=3"] and page.locator("td pre").inner_text().startswith("settings")
    page.reload()
    page.get_by_label("pin other").and_(page.locator("[aria-pressed=true]")).wait_for()
    page.locator("th", has_text="Run").click()
    assert "other" in page.locator("tbody tr").first.inner_text()  # pinned, whatever is sorted
    page.get_by_role("link", name="Watch ⚠ 1").click()
    page.get_by_text([*RULES][0]).wait_for()
    page.get_by_text("view.alerts.command: ").wait_for()
    page.get_by_text(f"disk of {runs}").wait_for()
    assert page.locator("img[onerror]").count() == 0 and page.get_by_role("link", name="<img").count() == 1
