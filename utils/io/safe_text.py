"""Remove control characters and secrets from untrusted text, before it is shown or stored.

A file name with line feeds, terminal escapes or changes of writing direction could forge a log line. A command line may
contain a key.
"""

import base64
import json
import os
import re
import unicodedata
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
_MIN_SECRET_CHARACTERS = 8  # shorter values also occur in ordinary words
_CONTROLS = ("Cc", "Cf", "Zl", "Zp", "Cs")  # categories of Unicode
_WORD = (  # the end of a name whose value is secret
    r"(?:(?:api|access|secret|private|account|shared|storage|signing|encryption|client|auth)[_-]?key(?:[_-]?id)?"
    r"|token|secret|password|passwd|passphrase|credentials?|signature|authorization|cookie|connection[_-]?string"
    r"|(?<![a-z])(?:sig|sas|pwd|jwt))"
)
_NAME = re.compile(rf"(?i).*{_WORD}", re.DOTALL)
_VARIABLE = re.compile(rf"(?i).*(?:{_WORD}|key|pass)")
_QUOTED = r"""\"(?:\\.|[^"\\\n])*\"|'(?:\\.|[^'\\\n])*'|["'][^\n]*"""
_AFTER = rf"""{_WORD}(?![\w-])[\\"'\]]*[^\S\n]*"""  # between a name and its separator
_PATTERNS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    # scheme://user:password@host, where the password may have slashes, and scheme://token@host
    (re.compile(r"""(:(?:\\*/){2})(?:[^\s"<>/?#:]*:[^\s"<>]*|[^\s"<>/?#:]+)@"""), rf"\1{HIDDEN}@"),
    (re.compile(rf"(?i)({_AFTER}:[^\S\n]+)(?:{_QUOTED}|[^\n]+)"), rf"\1{HIDDEN}"),  # headers, YAML and JSON
    (re.compile(rf"""(?i)({_AFTER}(?:=>?[^\S\n]*|[:>])\\*)(?:{_QUOTED}|[^\s"]+)"""), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(--?[\w-]{{0,40}}{_WORD}[^\S\n]+)(?:{_QUOTED}|[^\s-]\S*)"), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?i:bearer)\s+|\bBasic\s+(?=\S*[A-Z0-9=]))[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    # Keys and tokens with a prefix: W&B, Hugging Face, GitHub, GitLab, Slack, OpenAI, Google, AWS; JSON web tokens.
    (re.compile(
        r"\b(?:wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
        r"|xox[a-z]-[\w-]{10,}|sk-[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|A[KS]IA[A-Z0-9]{16}\b"
        r"|eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.[\w-]*)"
    ), HIDDEN),
    (re.compile(r"(?<!commit )(?<!@)\b[0-9a-f]{40}\b"), HIDDEN),  # W&B's older keys; commits look the same
)  # fmt: skip


class Lines(str):
    """A text whose line feeds a log does not escape."""

    __slots__ = ()


def escape_controls(text: str, keep: str = "") -> str:
    r"""Escape control, format, separator and surrogate characters as `\x1b`, except those in `keep`.

    The joiners in words and emoji (U+200C, U+200D) are harmless.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _CONTROLS and character not in keep + "\u200c\u200d"
        else character
        for character in text
    )


def safe_lines(text: str) -> str:
    """Return a text without secrets and without control characters other than line feeds and tabs."""
    return hide_secrets(escape_controls(text, keep="\n\t"))


def code_span(value: Any) -> str:
    """Return a value as a code span of Markdown on one line, without secrets: nothing in it is markup or a link."""
    text = hide_secrets(escape_controls(str(value)))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def hide_secrets(text: str) -> str:
    """Replace each secret by `***`; text around it may be hidden, too.

    Secrets are user and password in URLs, signatures of presigned URLs, known forms of keys and tokens, private keys,
    values after a name such as `password` (in an assignment, JSON, YAML, a header or a flag), and the values of
    environment variables with such a name, except paths of files.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    values = {value for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}
    values = {value for value in values if not (os.path.isabs(value) and os.path.exists(value))}
    for form in sorted({form for value in values for form in _forms(value)}, key=len, reverse=True):
        if len(form) >= _MIN_SECRET_CHARACTERS:
            text = text.replace(form, HIDDEN)
    return text


def _forms(value: str) -> set[str]:
    """Return a value as it is, in a URL, in JSON, in Python, in a log and in base64."""
    data = value.encode(errors="surrogateescape")
    quoted = {form[1:-1] for form in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value))}
    encoded = {quote(data), quote(data, safe=""), quote_plus(data), base64.b64encode(data).decode("ascii")}
    return {value, escape_controls(value), *quoted, *encoded}


def hide_secrets_in(value: Any) -> Any:
    """Replace each secret in nested dictionaries and lists by `***`; keys stay."""
    if isinstance(value, dict):
        secret = {key for key, inner in value.items() if inner and isinstance(key, str) and _NAME.fullmatch(key)}
        return {key: HIDDEN if key in secret else hide_secrets_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        hidden = []
        for before, item in zip(("", *value), value):
            follows_flag = str(before).startswith("-") and _NAME.fullmatch(str(before))
            hidden.append(HIDDEN if follows_flag else hide_secrets_in(item))
        return hidden
    return hide_secrets(value) if isinstance(value, str) else value
