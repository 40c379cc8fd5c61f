"""What others wrote is shown without control characters and without secrets: in the log, on the terminal and in the run
folder's files.
"""

import json
import random
import re

import pytest

from tests.in_process import TINY, make_images, run_command
from tests.in_process import run as run_script
from utils.io.files import read_json
from utils.io.safe_text import HIDDEN, code_span, escape_controls, hide_secrets, hide_secrets_in, safe_lines, safe_row


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nERROR forged\rb\tc\0d", r"a\nERROR forged\rb\tc\x00d"),
        ("\x1b[2J\x1b]0;title\x07\x9b31m", r"\x1b[2J\x1b]0;title\x07\x9b31m"),
        ("a\u2028b\u2029c\x85\ufeff\u200b\udc80", r"a\u2028b\u2029c\x85\ufeff\u200b\udc80"),
        ("日本 é ß 猫 👩‍🚀 العربية a\u00a0b C:\\new", "日本 é ß 猫 👩‍🚀 العربية a\u00a0b C:\\new"),
    ],
)
def test_control_characters_are_escaped_and_scripts_are_not(text, shown):
    assert escape_controls(text) == shown
    assert escape_controls("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


_BASE64, _HEX, _TOKEN = "abcXYZ0189+/=", "abcdef0189%", "abcXYZ0189-_.~"
_URL, _PRINTED = "abcXYZ0189-._~!$&'()*+,;=:%/@#?", "".join(map(chr, range(33, 127)))
_LINES = """pass={} x
export DB_PASS={}
a.session={}
http://x/y?key={}&x=1
http://x/y?x=1&auth={}
curl -u me:{} http://x
curl -s --user me:{} http://x
me:{}@host
at db=me:{}@db.example:5432/x
https://hooks.slack.com/services/T0/B0/{}
https://discord.com/api/webhooks/1/{} x
-----BEGIN PGP PRIVATE KEY BLOCK----- {} -----END PGP PRIVATE KEY BLOCK----- x
---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ---- {} ---- END SSH2 ENCRYPTED PRIVATE KEY ---- x"""
FORMS = {  # {} is the secret, of these characters
    "s3://AKIDEXAMPLE:{}@host/bucket/x.tar": _URL,
    "https://{}@github.com/me/x.git": _TOKEN + "%",
    "filecache::https://{}:@host:8080/x?y=1": _TOKEN + "%",
    '{{"url": "https:\\/\\/me:{}@host"}}': _URL,
    "https://b.s3.amazonaws.com/x?X-Amz-Credential={}%2Fs3&X-Amz-Expires=9": _HEX,
    "x?X-Amz-Expires=9&X-Amz-Signature={}&x=1": _HEX,
    "AWSAccessKeyId=A&Signature={}&Expires=1": _HEX,
    "https://a.blob.core.windows.net/x?se=1&sig={}": _URL,
    "AccountKey={};EndpointSuffix=x": _BASE64,
    "<SecretAccessKey>{}</SecretAccessKey>": _BASE64,
    '{{"password": "{}", "x": 1}}': _PRINTED + " é",
    '"a": {{\\"token\\": \\"{}\\"}}': _BASE64,
    "{{'secret_key': '{}'}}": _BASE64 + " ",
    "os.environ['API_KEY'] = '{}'": _BASE64,
    "a = f(client_secret={})": _BASE64,
    "secretAccessKey: {}": _PRINTED,
    "db:\n  passwd: {}\n  user: me": _PRINTED + " ",
    "export HF_TOKEN={} # mine": _BASE64,
    "++data.store={{user:me,password:{}}}": _BASE64,
    "Authorization: Bearer {}": _BASE64,
    "curl -H 'Authorization: Basic {}' x": _BASE64,
    "X-Api-Key: {}": _PRINTED,
    "Cookie: a={}; b=1": _PRINTED,
    "got Bearer {} from x": _TOKEN,
    "run --access-token {} --x": _BASE64,
    "run --password '{}' x": _BASE64 + " ",
    **dict.fromkeys(_LINES.splitlines(), _TOKEN),
    "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY----- x": _BASE64 + "\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_shows_a_secret(form):
    """Secrets of random characters, in the text, in a list of words, in JSON of the text, and in a log."""
    draw = random.Random(form)
    for _ in range(60):
        secret = "Qq" + "".join(draw.choices(FORMS[form], k=draw.randint(6, 40))) + "qQ"
        text = form.format(json.dumps(secret)[1:-1] if form.startswith('{{"') else secret)
        for masked in (hide_secrets(text), hide_secrets(json.dumps(text)), safe_lines(text), *hide_secrets_in([text])):
            assert HIDDEN in masked and "Qq" not in masked and "qQ" not in masked, (text, masked)


# Source: the rules of Yelp/detect-secrets:detect_secrets/plugins. @N: so many characters.
TOKENS = """npm_@36 pypi-AgEIcHlwaS5vcmc@70 sk_live_@24 rk_live_@24 glrt-@20 gloas-@20 SG.@22.@43 sq0csp-@43
12345678:@35 AKC@10 M@23.@6.@27 ghp_@36 wandb_v1_@24 github_pat_@40 hf_@34 eyJ@9.eyJ@9.@9 AIza@35
0123456789abcdef0123456789abcdef01234567"""
ORDINARY = """https://host:80/a s3://bucket/a@b data.root=x sorted(x, key=len)
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef is a SHA-256
monkey=3 pass=3 bypass=all session=2
pass: 12 images
key_(object), password_(object), :@ ;@, token_embedding: 3
data/pass/a:b@c/1.png npm_folder/pypi-my-own-folder sk_live_show
x@y.org mailto:me@y.org hf:net@main 12:30:05 @noon
docker run -u 1000:1000
the same command continues (a token: HF_TOKEN)
?token=TOKEN followed by
--token TOKEN"""


def test_tokens_of_services_are_masked_and_ordinary_words_and_our_advice_are_not():
    tokens = re.sub(r"@(\d+)", lambda count: ("aB3" * 30)[: int(count[1])], TOKENS).split()
    assert [hide_secrets(f"got {token}, x") for token in tokens] == [f"got {HIDDEN}, x"] * len(tokens)
    assert hide_secrets(ORDINARY) == ORDINARY


def test_a_message_of_300000_letters_is_short(tmp_path, capfd, monkeypatch):
    assert run_command("prepare", [f"data.root={'a/' * 150_000}", "job=check"], tmp_path, monkeypatch) == 2
    assert len(capfd.readouterr().err) < 9_000


def test_values_under_secret_names_are_hidden():
    values = {"api_key": "x", "max_tokens": 7, "auth": {"password": ["a", "b"], "token": None}}
    hidden = {"api_key": HIDDEN, "max_tokens": 7, "auth": {"password": HIDDEN, "token": None}}
    assert hide_secrets_in(values) == hidden and hide_secrets_in(["--token", "x", "y"]) == ["--token", HIDDEN, "y"]


@pytest.mark.parametrize("text", ["a", "`a", "``` a`", "a\n---\n<script>[x](y)", "https://me:pass@x"])
def test_a_code_span_is_one_line_of_text(text):
    span = code_span(text)
    fence = re.match("`+", span).group()
    inner = span.removeprefix(fence).removesuffix(fence)
    assert span.endswith(fence) and fence not in re.findall("`+", inner) and "\n" not in span and "pass@" not in span


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


def test_names_and_keys_in_a_whole_run(tmp_path, monkeypatch):
    """A hostile name is one line of the log; a key in the environment, and one on the command line, is in no file."""
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-up")
    root = make_images(tmp_path / "images")
    forged = "a\nERROR forged\x1b[1A\u202e"
    (root / f"train/A/{forged}.png").write_bytes(b"no image")
    overrides = [*TINY, "data.root=images", "run_dir=sesame-open-up", "loop.find=null", "loop.total_steps=4"]
    run_script("finetune", overrides, tmp_path)
    run_dir = tmp_path / "sesame-open-up"
    log = (run_dir / "log.txt").read_text()
    assert not any(line.startswith("ERROR") for line in log.splitlines()) and r"a\nERROR forged\x1b[1A\u202e.png" in log
    for file in run_dir.iterdir():
        if file.is_file():
            assert "sesame" not in file.read_text(), file
    assert read_json(run_dir / "config.json")["run_dir"] == HIDDEN
    assert f"run_dir='{HIDDEN}'" in (run_dir / "overrides.txt").read_text()
    run_script("finetune", [*overrides[:-1], "loop.total_steps=5"], tmp_path)  # and it goes on


def test_a_cell_is_no_formula_of_a_spreadsheet_and_numbers_stay():
    names = ["=1+HYPERLINK(1)", "@sum", "+_+", "-x.png", "\tx"]
    assert list(safe_row(dict(enumerate(names))).values()) == [f"'{name}" for name in names]
    values = [-0.5, -1e-07, float("-inf"), "-3", "x=1", "", None, 7]
    assert list(safe_row(dict(enumerate(values))).values()) == values
