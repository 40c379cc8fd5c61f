"""The dashboard: the view that arrives at the server, names of figures that runs really log, refusals."""

import json
import os
import subprocess
import sys

import pytest

from tests.in_process import TINY, make_images, run
from tests.support import ROOT
from tests.wandb_server import ENTITY, WandbServer
from utils.record.tracker import name_figures
from utils.record.wandb_dashboard import CHARTS, NAME, PICTURES, TABLES

KEY = "0123456789abcdef" * 2 + "01234567"


def dashboard(server, folder, *words, key=KEY):
    """Run the command; returns (status, what it printed, errors)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_BASE_URL": server.url}
    environment |= {"WANDB_API_KEY": key} if key else {}
    command = [sys.executable, "-m", "utils.record.wandb_dashboard", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_view_arrives_with_every_chart(tmp_path):
    with WandbServer() as server:
        status, said, errors = dashboard(server, tmp_path, "photos")
        assert (status, errors) == (0, "") and said.startswith(f"{server.url}/{ENTITY}/photos?nw=")
        assert dashboard(server, tmp_path, "team/photos")[0] == 0
        (mine, teams) = server.views
        assert server.operations.index("CreateProject") < server.operations.index("UpsertView2") and not server.unknown
    assert (mine["entityName"], mine["projectName"], mine["displayName"]) == (ENTITY, "photos", NAME)
    assert (teams["entityName"], teams["projectName"]) == ("team", "photos")
    spec = mine["spec"]
    names = [name for charts in CHARTS.values() for _, names in charts for name in names]
    missing = [name for name in [*names, *PICTURES, *TABLES] if json.dumps(name)[1:-1] not in spec]
    assert not missing
    sections = json.loads(spec)["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(CHARTS) + 2] == [*CHARTS, "Pictures", "Tables"]
    axes = {
        panel["config"]["xAxis"] for section in sections for panel in section["panels"] if "xAxis" in panel["config"]
    }
    assert axes == {"step", "samples"}


def test_every_figure_of_the_dashboard_is_one_that_runs_log(tmp_path):
    images = make_images(tmp_path / "images")
    common = [*TINY, f"data.root={images}", "loop.total_steps=4"]
    run("pretrain_fcmae", [*common, "task.decoder_dim=8", "run_dir=pre"], tmp_path)
    run(
        "finetune",
        [*common, "run_dir=fine", "loop.ema_decay=0.9", "loop.evaluate_raw=true", "schedule=onecycle"],
        tmp_path,
    )
    logged, pictures, tables = set(), set(), set()
    for name in ("pre", "fine"):
        for row in rows_with_readings(tmp_path / name):
            logged |= set(name_figures(row["kind"], row))
        pictures |= {f"images/{path.stem}" for path in (tmp_path / name / "plots").glob("*.png")}
        tables |= {f"tables/{path.stem}" for path in (tmp_path / name / "tables").glob("*.csv")}
    assert {name for charts in CHARTS.values() for _, names in charts for name in names} <= logged
    assert set(PICTURES) <= pictures and set(TABLES) <= tables


def rows_with_readings(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("mood", "key", "said"),
    [
        ("answers", "", "wandb_dashboard: no API key was found; run `wandb login` once\n"),
        pytest.param(
            "fails", KEY, "wandb_dashboard: W&B does not make the view in team/photos: ", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_done_is_said(mood, key, said, tmp_path):
    with WandbServer() as server:
        server.mood = mood
        status, _, errors = dashboard(server, tmp_path, "team/photos", key=key)
    assert status == 2 and errors.startswith(said) and "Traceback" not in errors
