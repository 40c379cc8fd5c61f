"""What others wrote is shown without control characters and without secrets: in the log, on the terminal, in the run
folder's files, and with a progress bar shown as without.
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
        ("a\nERROR forged", r"a\nERROR forged"),
        ("a\rb\tc\0d", r"a\rb\tc\x00d"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("gpj.\u202egnp.exe\u2066\u2069\u200f", r"gpj.\u202egnp.exe\u2066\u2069\u200f"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\ufeffa\u200b", r"\ufeffa\u200b"),
        ("\udc80", r"\udc80"),
        ("日本 é ß 猫 👩‍🚀 العربية a\u00a0b", "日本 é ß 猫 👩‍🚀 العربية a\u00a0b"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_control_characters_are_escaped_and_scripts_are_not(text, shown):
    assert escape_controls(text) == shown


def test_those_to_keep_stay():
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
        ("hf_" + "a" * 34, HIDDEN),
        ("ghp_" + "a" * 36, HIDDEN),
        ("wandb_v1_" + "aB3_" * 8, HIDDEN),
        ("optim.lr=0.5 model=tiny", "optim.lr=0.5 model=tiny"),
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
    assert (
        hide_secrets(f"hunter2x lower-case abc {tmp_path} qwertyuiop") == f"{HIDDEN} {HIDDEN} abc {tmp_path} qwertyuiop"
    )
    assert hide_secrets_in({"a": ["hunter2x", 1, None, {"b": "x hunter2x"}], "hunter2x": 0.5}) == {
        "a": [HIDDEN, 1, None, {"b": f"x {HIDDEN}"}], "hunter2x": 0.5,
    }  # fmt: skip


@pytest.fixture
def said(capsys):
    """Log through both handlers; returns what a call of the log wrote to the terminal and to the file."""
    file = io.StringIO()
    logger = logging.getLogger(house.ROOT)
    before = list(logger.handlers), logger.propagate, logger.level
    logger.handlers = []
    house.setup_logging(0)

    def read(template, *values):
        file.truncate(file.seek(0))
        house.get_logger("test").warning(template, *values)
        return capsys.readouterr().err, file.getvalue()

    with house.log_copied_to(file):
        yield read
    logger.handlers, logger.propagate, logger.level = before


@pytest.mark.parametrize("make", [str, OSError], ids=["text", "error"])
def test_a_file_name_cannot_begin_a_line(said, make):
    terminal, file = said("unreadable image %s: %d bytes", make("a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2K"), 3)
    shown = r"unreadable image a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2K: 3 bytes"
    assert terminal == shown + "\n" and file.endswith(f" WARNING {shown}\n") and file.count("\n") == 1


def test_a_table_of_our_own_keeps_its_lines(said):
    terminal, _ = said("groups:\n%s", Lines("a  1\nb  2\x1b[1m"))
    assert terminal == "groups:\na  1\nb  2\\x1b[1m\n"


def test_a_secret_is_in_neither(said, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "do-not-tell")
    for text in said("cannot reach %s with do-not-tell", "https://me:word@host"):
        assert "do-not-tell" not in text and "me:word" not in text and f"https://{HIDDEN}@host" in text


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
    words = ["job=manifest", "data=image_folder", "data.root=https://me:word@host/x"]
    assert run_command("prepare", words, tmp_path, monkeypatch) == 2
    said = capsys.readouterr().err
    assert f"https://{HIDDEN}@host/x" in said and "word" not in said
