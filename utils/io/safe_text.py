"""Remove control characters and secrets from untrusted text, before it is shown or stored.

A file name with line feeds, terminal escapes or changes of writing direction could forge a log line. A command line may
contain a key.
"""

import os
import re
import unicodedata
from typing import Any

HIDDEN = "***"
_MIN_SECRET_CHARACTERS = 8  # shorter values also occur in ordinary words
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_KINDS = r"api[_-]?key|(?:access|secret|private)[_-]key"
_PATTERNS = (
    (re.compile(r"(://)[^/\s:@]*:[^/\s@]+@"), rf"\1{HIDDEN}@"),  # scheme://user:password@host
    (re.compile(rf"(?i)\b([\w.-]*(?:{_KINDS}|token|secret|password)=)(['\"]?)[^\s,'\"]+\2"), rf"\1{HIDDEN}"),
    # Keys and tokens with a prefix: W&B's current ones, Hugging Face's, GitHub's.
    (re.compile(r"\b(?:wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"), HIDDEN),
    (re.compile(r"\b[0-9a-f]{40}\b"), HIDDEN),  # W&B's older keys; commits look the same
)


class Lines(str):
    """A text whose line feeds a log does not escape."""

    __slots__ = ()


def escape_controls(text: str, keep: str = "") -> str:
    r"""Escape control characters, line separators and direction marks as `\x1b`, except those in `keep`.

    Letters and symbols of every script stay unchanged.
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) if character not in keep else character for character in text)


def safe_lines(text: str) -> str:
    """Return a text without secrets and without control characters other than line feeds and tabs."""
    return hide_secrets(escape_controls(text, keep="\n\t"))


def _escape(character: str) -> str:
    """Escape control, format, separator and surrogate characters.

    The joiners in words and emoji (U+200C, U+200D) are harmless format characters.
    """
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") and character not in "\u200c\u200d"
    return character.encode("unicode_escape").decode("ascii") if is_control else character


def hide_secrets(text: str) -> str:
    """Replace each secret by `***`.

    Secrets are passwords in URLs, known forms of keys and tokens, values after `key=`, and the values of environment
    variables named like a key, except paths of files.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _MIN_SECRET_CHARACTERS and not (os.path.isabs(value) and os.path.exists(value)):
            text = text.replace(value, HIDDEN)
    return text


def hide_secrets_in(value: Any) -> Any:
    """Replace each secret in nested dictionaries and lists by `***`; keys stay."""
    if isinstance(value, dict):
        return {key: hide_secrets_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets_in(inner) for inner in value]
    return hide_secrets(value) if isinstance(value, str) else value
