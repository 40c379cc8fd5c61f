"""Remove control characters and secrets from untrusted text, before it is shown or stored.

A file name with line feeds, terminal escapes or changes of writing direction could forge a log line. A command line may
contain a key.
"""

import base64
import json
import os
import re
import unicodedata
from collections.abc import Mapping
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
_SHOWN = r"(?-i:(?!(?:[A-Z]+_)*(?:TOKEN|KEY|PASSWORD)\b))"  # what follows is no placeholder: our "a token: HF_TOKEN"
_FORMS = (  # what follows the first group is secret
    r"(?s)()-{4,5} ?BEGIN [A-Z0-9 ]+-{4,5}.*?(?:-{4,5} ?END [A-Z0-9 ]+-{4,5}|\Z)",  # PEM and PGP
    # scheme://user:password@host, where the password may have slashes, scheme://token@host, and user:password@host
    r"""(:(?:\\*/){2})(?:[^\s"<>/?#:]*:[^\s"<>]*|[^\s"<>/?#:]+)(?=@)""",
    r"""(?<![\w/:@.\\-])(?!mailto:|hf:)([A-Za-z][\w.+-]*:)[^\s"'<>/\\]+(?=@\w)""",
    # Addresses whose path is the secret
    r"""((?:hooks\.slack\.com|discord(?:app)?\.com/api|webhook\.office\.com|api\.telegram\.org)\\*/)[^\s"'<>]+""",
    rf"(?i)({_AFTER}:[^\S\n]+){_SHOWN}(?:{_QUOTED}|[^\n]+)",  # headers, YAML and JSON
    rf"""(?i)({_AFTER}(?:=>?[^\S\n]*|[:>])\\*){_SHOWN}(?:{_QUOTED}|[^\s"]+)""",
    # Names that are also ordinary words: before a `=` without a number after it, or in a query
    r"""(?i)((?<![a-z])(?:pass|auth|session(?:[_-]?id)?)=\\*(?![\d.]+\b)|[?&](?:key|auth|pass|session)=)[^\s"]+""",
    rf"(?i)(--?[\w-]{{0,40}}{_WORD}[^\S\n]+){_SHOWN}(?:{_QUOTED}|[^\s-]\S*)",
    rf"(\bcurl\s(?:[^\n]{{0,200}}?\s)?(?:-[a-zA-Z]*u|--(?:proxy-)?user\b)[=\s]?[^\S\n]*)(?:{_QUOTED}|\S+)",
    r"(\b(?i:bearer)\s+|\bBasic\s+(?=\S*[A-Z0-9=]))[\w.~+/=-]{8,}",
    # Keys and tokens with a form of their own, by service
    r"\b()(?:wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|gl[a-z]{2,6}-[\w-]{20,}"
    r"|xox[a-z]-[\w-]{10,}|sk-[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|A[KS]IA[A-Z0-9]{16}\b"
    r"|npm_[A-Za-z0-9]{30,}|pypi-Ag[\w-]{20,}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|sq0[a-z]{3}-[\w-]{20,}|(?:AC|SK)[0-9a-f]{32}\b|[0-9a-f]{32}-us\d{1,2}\b|AKC[A-Za-z0-9]{10,}|hvs\.[\w-]{20,}"
    r"|\d{8,10}:[\w-]{35}(?![\w-])|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}|dop_v1_[0-9a-f]{40,}"
    r"|eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.[\w-]*)",
    r"()(?<!commit )(?<!@)\b[0-9a-f]{40}\b",  # W&B's older keys; commits look the same
)  # fmt: skip
_PATTERNS = [*map(re.compile, _FORMS)]
_LONG = re.compile(r"^(.{2000}).{1000,}(.{1000})$", re.MULTILINE)  # a line of a message that nobody reads whole


_FORMULA = re.compile(r"[=+@\t\r-](?!inf$|[\d.e+-]*$)")  # and no number


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


def message_lines(text: str) -> str:
    """Return `safe_lines` of a message; of a line beyond 4,000 characters, its beginning and its end."""
    return _LONG.sub(r"\1 [...] \2", safe_lines(text))


def safe_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for CSV without formulas of spreadsheets: a text that looks like one begins with an apostrophe."""
    return {key: f"'{value}" if _FORMULA.match(str(value)) else value for key, value in row.items()}


def code_span(value: Any) -> str:
    """Return a value as a code span of Markdown on one line, without secrets: nothing in it is markup or a link."""
    text = hide_secrets(escape_controls(str(value)))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def hide_secrets(text: str) -> str:
    """Replace each secret by `***`; text around it may be hidden, too.

    Secrets are user and password in URLs, signatures of presigned URLs, known forms of keys and tokens, PEM and PGP
    blocks, values after a name such as `password` (in an assignment, JSON, YAML, a header or a flag), and the values of
    environment variables with such a name, except paths of files. A placeholder, such as TOKEN or HF_TOKEN, stays.
    """
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
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
