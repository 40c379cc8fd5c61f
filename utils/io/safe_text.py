"""Text that others wrote, before it is shown or kept: no control characters, no secrets.

A file name may hold a line feed, the escapes of a terminal or a change of writing direction, and would forge a log line
with them; a command line may hold a key.
"""

import os
import re
import unicodedata
from typing import Any

HIDDEN = "***"
_MIN_SECRET_CHARACTERS = 8  # shorter values occur in too many other words
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_KINDS = r"api[_-]?key|(?:access|secret|private)[_-]key"
_PATTERNS = (
    (re.compile(r"(://)[^/\s:@]*:[^/\s@]+@"), rf"\1{HIDDEN}@"),  # scheme://user:password@host
    (re.compile(rf"(?i)\b([\w.-]*(?:{_KINDS}|token|secret|password)=)(['\"]?)[^\s,'\"]+\2"), rf"\1{HIDDEN}"),
    # Keys and tokens that say what they are: W&B's of today, Hugging Face's, GitHub's.
    (re.compile(r"\b(?:wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"), HIDDEN),
    (re.compile(r"\b[0-9a-f]{40}\b"), HIDDEN),  # W&B's of before; commits look the same
)


class Lines(str):
    """A text of several lines that a log may show as they are; of other texts, line feeds are escaped."""

    __slots__ = ()


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters, line separators and marks of direction escaped, `\x1b`.

    Those in `keep` stay. Letters and symbols of every script stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) if character not in keep else character for character in text)


def safe_lines(text: str) -> str:
    """Return a text as it may be shown: without control characters but line feeds and tabs, and without secrets."""
    return hide_secrets(escape_controls(text, keep="\n\t"))


def _escape(character: str) -> str:
    """Escape a character that moves the cursor, hides, or orders others: control, format, separator, surrogate.

    The joiners within words and emoji (U+200C, U+200D) are format characters that show nothing by themselves.
    """
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") and character not in "\u200c\u200d"
    return character.encode("unicode_escape").decode("ascii") if is_control else character


def hide_secrets(text: str) -> str:
    """Return a text with `***` for each secret: passwords in addresses, keys and tokens by their looks or by `key=`,
    and the values of environment variables that are named like one, unless they are the path of a file.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _MIN_SECRET_CHARACTERS and not (os.path.isabs(value) and os.path.exists(value)):
            text = text.replace(value, HIDDEN)
    return text


def hide_secrets_in(value: Any) -> Any:
    """Return a value of dictionaries, lists and texts with `***` for each secret in its texts; keys stay."""
    if isinstance(value, dict):
        return {key: hide_secrets_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets_in(inner) for inner in value]
    return hide_secrets(value) if isinstance(value, str) else value
