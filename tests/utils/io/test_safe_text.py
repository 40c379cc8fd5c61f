"""What others wrote is shown without control characters and without secrets: in the log, on the terminal and in the run
folder's files.
"""

import io
import json
import logging

import pytest

from tests.in_process import TINY, make_images, run_command
from tests.in_process import run as run_script
from utils.io.safe_text import HIDDEN, Lines, escape_controls, hide_secrets, hide_secrets_in
from utils.record import logging as house

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nERROR forged\rb\tc\0d", r"a\nERROR forged\rb\tc\x00d"),
        ("\x1b[2J\x1b]0;title\x07\x9b31m", r"\x1b[2J\x1b]0;title\x07\x9b31m"),
        ("gpj.\u202egnp.exe\u2066\u2069\u200f", r"gpj.\u202egnp.exe\u2066\u2069\u200f"),
        ("a\u2028b\u2029c\x85\ufeff\u200b\udc80", r"a\u2028b\u2029c\x85\ufeff\u200b\udc80"),
        ("日本 é ß 猫 👩‍🚀 العربية a\u00a0b C:\\new", "日本 é ß 猫 👩‍🚀 العربية a\u00a0b C:\\new"),
    ],
)
def test_control_characters_are_escaped_and_scripts_are_not(text, shown):
    assert escape_controls(text) == shown
    assert escape_controls("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass1@host/x?y=1", f"https://{HIDDEN}@host/x?y=1"),
        ("s3://:only-password@host", f"s3://{HIDDEN}@host"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        (f"key {KEY}.", f"key {HIDDEN}."),
        (KEY + KEY[:24], KEY + KEY[:24]),  # a SHA-256
        ("+wandb.api_key=abc data.root=x", f"+wandb.api_key={HIDDEN} data.root=x"),
        ("db.password='a1',x=2", f"db.password={HIDDEN},x=2"),
        ("sorted(x, key=len)", "sorted(x, key=len)"),
        ("hf_" + "a" * 34 + " ghp_" + "a" * 36 + " wandb_v1_" + "aB3_" * 8, f"{HIDDEN} {HIDDEN} {HIDDEN}"),
    ],
)
def test_secrets_are_known_by_their_looks(text, shown):
    assert hide_secrets(text) == shown


def test_values_of_variables_named_like_secrets_are_hidden(monkeypatch, tmp_path):
    for name, value in {
        "MY_API_KEY": "correct horse", "LONGER_TOKEN": "correct horse battery", "DB_PASSWORD": "hunter2x",
        "SHORT_KEY": "abc", "SSH_KEY": str(tmp_path), "KEYBOARD": "qwertyuiop", "some_secret": "lower-case",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert hide_secrets("correct horse battery, correct horse") == f"{HIDDEN}, {HIDDEN}"
    assert hide_secrets(f"hunter2x lower-case abc {tmp_path} qwerty") == f"{HIDDEN} {HIDDEN} abc {tmp_path} qwerty"
    assert hide_secrets_in({"a": ["hunter2x", 1, None, {"b": "x hunter2x"}], "hunter2x": 0.5}) == {
        "a": [HIDDEN, 1, None, {"b": f"x {HIDDEN}"}], "hunter2x": 0.5,
    }  # fmt: skip


def test_the_log_shows_no_forged_line_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "do-not-tell")
    logger, file = logging.getLogger(house.ROOT), io.StringIO()
    before = list(logger.handlers), logger.propagate, logger.level
    logger.handlers = []
    house.setup_logging(0)
    with house.log_copied_to(file):
        file.close = lambda: None
        log = house.get_logger("test")
        for make in (str, OSError):
            log.warning("unreadable image %s: %d bytes", make("a\nERROR forged\x1b[2K"), 3)
        log.warning("groups:\n%s", Lines("a  1\nb  2\x1b[1m"))  # a table of our own keeps its lines
        log.warning("cannot reach %s with do-not-tell", "https://me:word@host")
    logger.handlers, logger.propagate, logger.level = before
    shown = r"unreadable image a\nERROR forged\x1b[2K: 3 bytes"
    lines = [shown, shown, "groups:", "a  1", r"b  2\x1b[1m", f"cannot reach https://{HIDDEN}@host with {HIDDEN}"]
    assert capsys.readouterr().err.splitlines() == lines
    assert [line.partition(" WARNING ")[2] or line for line in file.getvalue().splitlines()] == lines


def test_names_and_keys_in_a_whole_run(tmp_path, monkeypatch):
    """A hostile name is one line of the log; a key in the environment, and one on the command line, is in no file."""
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-up")
    root = make_images(tmp_path / "images")
    forged = "a\nERROR forged\x1b[1A\u202e"
    (root / "train/A" / f"{forged}.png").write_bytes(b"no image")
    overrides = [*TINY, "data.root=images", "run_dir=sesame-open-up", "loop.train_paths=null", "loop.total_steps=4"]
    run_script("finetune", overrides, tmp_path)
    run_dir = tmp_path / "sesame-open-up"
    log = (run_dir / "log.txt").read_text()
    assert not any(line.startswith("ERROR") for line in log.splitlines()) and r"a\nERROR forged\x1b[1A\u202e.png" in log
    for file in run_dir.iterdir():
        if file.is_file():
            assert "sesame" not in file.read_text(), file
    assert json.loads((run_dir / "config.json").read_text())["run_dir"] == HIDDEN
    assert f"run_dir='{HIDDEN}'" in (run_dir / "overrides.txt").read_text()
    run_script("finetune", [*overrides[:-1], "loop.total_steps=5"], tmp_path)  # and it goes on


def test_a_command_hides_the_key_in_what_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-up")
    words = ["data.root=https://me:word@host/x", "run_dir=x", "tracking=sesame-open-up\x1b[1A"]
    assert run_command("finetune", words, tmp_path, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "tracking" in said and "sesame" not in said and "\x1b" not in said
