"""Trackers. What they write is read back: W&B's offline file (config, figures, pictures, the id over a resumption),
TensorBoard's event files; that a tracker changes no run and ends none; refusals; no key in any file.
"""

import json
import re
import struct
import sys

import numpy as np
import pytest

from tests.in_process import TINY, configure, make_images, run
from tests.support import is_reading, rows, start
from utils.config.messages import ConfigError
from utils.errors import UserError
from utils.record.tracker import RunInfo, name_figures
from utils.record.trackers import start_tracker
from utils.record.wandb_mode import choose_mode

KEY = "0123456789abcdef" * 2 + "01234567"
WANDB = ["tracking=wandb", "tracking.mode=offline", "tracking.project=tests", "tracking.tags=[small,glyphs]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("trackers") / "images")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Keep the user's own W&B settings out; a key is there, which no file may hold."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def read_log(path):
    """Yield the records of LevelDB's log format behind W&B's header of 7 bytes: blocks of 32768 bytes, each record
    crc32, length (little endian), type (1 whole, 2 first, 3 middle, 4 last part).
    """
    data, at, parts = path.read_bytes(), 7, []
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:
            return
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(run_dir):
    """Return for each session of an offline run: its id, name, tags, config and logged rows."""
    from wandb.proto.wandb_internal_pb2 import Record

    sessions = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns):
        session = {"rows": [], "config": {}, "metrics": []}
        (file,) = folder.glob("*.wandb")
        for data in read_log(file):
            record = Record.FromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    session |= {"id": record.run.run_id, "name": record.run.display_name, "tags": [*record.run.tags],
                                "project": record.run.project}  # fmt: skip
                    session["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    items = record.history.item
                    row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                    session["rows"].append(row)
                case "metric":
                    session["metrics"].append(
                        (record.metric.glob_name or record.metric.name, record.metric.step_metric)
                    )
        sessions.append(session)
    return sessions


def fine_tune(images, folder, *overrides):
    return run("finetune", [*TINY, f"data.root={images}", "run_dir=run", *overrides], folder)


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """Return the run folder of three steps without a tracker."""
    folder = tmp_path_factory.mktemp("plain")
    fine_tune(images, folder, "loop.total_steps=3")
    return folder / "run"


def finite(row):
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


SAMPLES = 4  # of a step


def wandb_rows(run_dir):
    """Return the rows that W&B must have: with the axes."""
    return [
        row | {"samples": SAMPLES * row["step"], f"{next(iter(row)).partition('/')[0]}/step": row["step"]}
        for row in expected_rows(run_dir)
    ]


def expected_rows(run_dir, kinds=("train", "evaluate", "epoch")):
    """Return the rows that a tracker must have, without readings."""
    return [
        {f"{row['kind']}/{name}": value for name, value in finite(row).items() if name != "step"}
        | {"step": row["step"]}
        for row in rows(run_dir / "metrics.jsonl")
        if row["kind"] in kinds
    ]


# ---------------------------------------------------------------------------------------------------------------- W&B


def test_wandb_offline_has_the_config_and_every_row_and_changes_nothing(images, plain, tmp_path):
    fine_tune(images, tmp_path, "loop.total_steps=3", *WANDB)
    run_dir = tmp_path / "run"
    (session,) = read_wandb(run_dir)
    assert (session["name"], session["project"], session["tags"]) == ("run", "tests", ["small", "glyphs"])
    assert session["id"] == (run_dir / "wandb_run_id.txt").read_text().strip()
    saved = json.loads((run_dir / "config.json").read_text())
    assert {name: value for name, value in session["config"].items() if name != "_wandb"} == saved
    assert saved["script"] == "finetune" and saved["tracking"]["project"] == "tests"
    assert ("*", "step") in session["metrics"]
    logged = [
        {name: value for name, value in row.items() if not name.startswith("_") and not is_reading(name)}
        for row in session["rows"]
    ]
    figures = [row for row in logged if not any(name.startswith(("images/", "tables/")) for name in row)]
    assert figures == wandb_rows(run_dir)
    assert rows(run_dir / "metrics.jsonl") == rows(plain / "metrics.jsonl")
    assert (run_dir / "weights/last_weights.safetensors").exists()


def test_wandb_continues_with_its_run_after_a_resumption_from_an_earlier_step(images, tmp_path, capfd):
    fine_tune(images, tmp_path, "loop.total_steps=3", "loop.checkpoint_every_steps=2", *WANDB)
    newest = tmp_path / "run/checkpoints/step_00000003"
    (newest / "state.json").write_text("{")  # damaged: the run goes back to step 2
    capfd.readouterr()
    fine_tune(images, tmp_path, "loop.total_steps=5", *WANDB)
    first, second = read_wandb(tmp_path / "run")
    assert first["id"] == second["id"]
    steps = [row["step"] for row in second["rows"] if "train/loss" in row]
    assert [row["step"] for row in first["rows"] if "train/loss" in row] == [1, 2, 3] and steps == [3, 4, 5]
    assert second["config"]["loop"]["total_steps"] == 5
    assert "wandb" not in capfd.readouterr().err.replace("wandb sync", "").replace("/wandb/", "")


def test_wandb_has_the_pictures_of_an_evaluation(images, tmp_path):
    more = ["task.decoder_dim=8", f"data.root={images}", "run_dir=run", "loop.total_steps=1", *WANDB]
    run("pretrain_fcmae", [*TINY, *more], tmp_path)
    (session,) = read_wandb(tmp_path / "run")
    (row,) = [row for row in session["rows"] if any(name.startswith("images/reconstructions") for name in row)]
    assert row["step"] == 1
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/files/media/images/**/reconstructions_*.png")
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_no_file_holds_the_key(images, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetune.py", f"data.token={KEY}", "optim.lr=1"])
    fine_tune(images, tmp_path, *WANDB)
    assert sys.argv[1] == f"data.token={KEY}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("override", ["dry_run=true", "dry_run=false"])
def test_online_without_a_login_is_refused_before_anything_is_made(override, images, tmp_path):
    """In a process of its own: W&B remembers a key for the life of a process."""
    arguments = [*TINY, f"data.root={images}", "run_dir=run", "tracking=wandb", "tracking.mode=online", override]
    variables = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    started = start("finetune.py", arguments, tmp_path, variables=variables)
    assert started.wait() == [2]
    assert started.output.splitlines()[-1] == (
        "finetune.py: tracking.mode: online was asked for (tracking.mode=online), and no API key was found; "
        "run `wandb login` once, or set tracking.mode=offline and send the run later with `wandb sync`"
    )
    assert not (tmp_path / "run").exists()


def wandb_options(*overrides):
    return configure("finetune", ["tracking=wandb", *overrides])[0].tracking


def test_the_mode_is_chosen_by_what_is_there(monkeypatch):
    monkeypatch.setattr("utils.record.wandb_mode.find_problem", lambda: None)
    assert choose_mode(wandb_options()) == ("online", "an API key was found")
    assert choose_mode(wandb_options("tracking.mode=online")) == ("online", "tracking.mode=online is set")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(wandb_options()) == ("disabled", "WANDB_MODE=disabled is set")
    assert choose_mode(wandb_options("tracking.mode=offline")) == ("offline", "tracking.mode=offline is set")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode(wandb_options()) == ("online", "WANDB_MODE=online is set")


def test_without_a_key_auto_is_offline_and_says_so(images, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.record.wandb_mode.find_problem", lambda: "no API key was found")
    fine_tune(images, tmp_path, "loop.total_steps=1", "tracking=wandb")
    (session,) = read_wandb(tmp_path / "run")
    assert session["project"] == "atelier" and [row["step"] for row in session["rows"] if "train/loss" in row] == [1]
    log = (tmp_path / "run/log.txt").read_text()
    assert "W&B: offline, because no API key was found; `wandb login` stores one" in log
    assert "W&B: send it later: wandb sync run/wandb/offline-run-*" in log


def test_a_wrong_mode_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(UserError) as refused:
        choose_mode(wandb_options())
    assert str(refused.value) == (
        "tracking.mode: auto takes WANDB_MODE, and 'dryrun' is not one of online, offline, disabled; change or unset "
        "it, or set tracking.mode"
    )


def test_disabled_is_no_tracker(tmp_path):
    assert start_tracker(wandb_options("tracking.mode=disabled"), RunInfo(tmp_path, {})) is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("tracking.project=a/b", "tracking.project: "),
        ("tracking.mode=on", "tracking.mode: "),
        ("tracking.group=''", "tracking.group: "),
        ("tracking.tags=['']", "tracking.tags.0: "),
        ("+tracking.key=1", "tracking.key: unknown key"),
    ],
)
def test_wrong_options_are_refused(override, problem):
    with pytest.raises(ConfigError) as refused:
        configure("finetune", ["tracking=wandb", override])
    assert refused.value.problems[0].startswith(problem)


# -------------------------------------------------------------------------------------------------------- TensorBoard


def read_events(run_dir):
    """Return the scalars as (name, step) -> value, and the pictures' steps by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = [(name, event.step, event.value) for name in tags["scalars"] for event in events.Scalars(name)]
    return scalars, {name: [event.step for event in events.Images(name)] for name in tags["images"]}


def check_events(run_dir):
    scalars, _ = read_events(run_dir)
    found = sorted((name, step, value) for name, step, value in scalars if not is_reading(name))
    wanted = sorted(
        (name, row["step"], value) for row in expected_rows(run_dir) for name, value in row.items() if name != "step"
    )
    assert [item[:2] for item in found] == [item[:2] for item in wanted]
    np.testing.assert_allclose([item[2] for item in found], [item[2] for item in wanted], rtol=1e-6)


def test_tensorboard_has_every_row_and_changes_nothing(images, plain, tmp_path):
    fine_tune(images, tmp_path, "loop.total_steps=3", "tracking=tensorboard")
    check_events(tmp_path / "run")
    assert rows(tmp_path / "run/metrics.jsonl") == rows(plain / "metrics.jsonl")


def test_tensorboard_hides_what_lay_beyond_the_checkpoint(images, tmp_path):
    settings = ["loop.checkpoint_every_steps=2", "tracking=tensorboard"]
    fine_tune(images, tmp_path, "loop.total_steps=3", *settings)
    (tmp_path / "run/checkpoints/step_00000003/state.json").write_text("{")
    fine_tune(images, tmp_path, "loop.total_steps=5", *settings)
    check_events(tmp_path / "run")


def test_tensorboard_has_pictures(tmp_path):
    tracker = start_tracker(configure("finetune", ["tracking=tensorboard"])[0].tracking, RunInfo(tmp_path, {}))
    tracker.add_image(7, "reconstructions", np.zeros((8, 12, 3), np.uint8))
    tracker.close()
    assert read_events(tmp_path) == ([], {"reconstructions": [7]})


# --------------------------------------------------------------------------------------------------------------- both


def test_another_tracker_may_follow_on_resumption(images, tmp_path):
    fine_tune(images, tmp_path, "loop.total_steps=1", "tracking=tensorboard")
    fine_tune(images, tmp_path, "loop.total_steps=2", *WANDB)
    fine_tune(images, tmp_path, "loop.total_steps=3")
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl", "train")] == [1, 2, 3]


def test_jsonl_is_no_tracker():
    assert start_tracker(configure("finetune", [])[0].tracking, RunInfo(None, {})) is None


def test_only_finite_numbers_go_out():
    figures = {"loss": 0.5, "norm": float("nan"), "rate": float("inf"), "count": 3, "note": "x", "none": None}
    assert name_figures("train", figures) == {"train/loss": 0.5, "train/count": 3}


def test_a_tracker_that_fails_is_named_once_and_ends_no_run(images, tmp_path, monkeypatch, capfd):
    def fail(self, *arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("utils.record.tensorboard_tracker.TensorboardTracker.add_row", fail)
    fine_tune(images, tmp_path, "loop.total_steps=3", "tracking=tensorboard")
    warnings = re.findall("tracking: .*", (tmp_path / "run/log.txt").read_text())
    assert warnings == [
        "tracking: TensorBoard failed (OSError: No space left on device) and is disabled; the run "
        "continues, and metrics.jsonl has every row"
    ]
    assert len(rows(tmp_path / "run/metrics.jsonl", "train")) == 3
