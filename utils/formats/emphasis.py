"""Emphasis in captions and prompts: brackets as the web UIs read them.

    (text) x 1.1    [text] / 1.1    {text} x 1.2    (text:1.3) x 1.3    BREAK begins another chunk

Brackets nest, and their weights multiply; `\\(` is a bracket of the text. A weight has one digit before its point, so
that `(1920)` and `(taken: 2020)` have none.
Source: AUTOMATIC1111/stable-diffusion-webui:modules/prompt_parser.py, parse_prompt_attention. Differs: brackets without
a partner are text, as in ComfyUI (there, an open one weighs all that follows); curly brackets are those of NovelAI.
"""

import re
from typing import NamedTuple

_FACTORS = {"(": 1.1, "[": 1 / 1.1, "{": 1.2}
_OPENING = {")": "(", "]": "[", "}": "{"}
MARK = re.compile(
    r"\\(?P<escaped>[()\[\]{}\\])|\s*\b(?P<break>BREAK)\b\s*|[(\[{]"
    r"|(?<=[^\s(])\s*:\s*(?P<weight>[+-]?(?:\d(?:\.\d*)?|\.\d+))\s*\)|[)\]}]"
)


class Emphasis(NamedTuple):
    """A text without marks of emphasis.

    chunks: (text, weight) of each part, between BREAKs. spans: the first and last bracket of pairs.
    """

    chunks: list[list[tuple[str, float]]]
    spans: list[tuple[int, int]]

    @property
    def plain(self) -> str:
        """The text alone."""
        return " ".join("".join(text for text, _ in chunk) for chunk in self.chunks)


def read_emphasis(text: str) -> Emphasis:
    """Read the emphasis of a text."""
    pieces = []  # text and weight; None for BREAK
    opened = []  # bracket, its piece, and its place in the text
    end = 0
    spans = []
    for found in MARK.finditer(text):
        mark = found[0]
        pieces += [[text[end : found.start()], 1.0], [found["escaped"] or mark, 1.0]]
        end = found.end()
        if found["break"]:
            pieces[-1][0] = None
        elif mark in _FACTORS:
            opened.append((mark, len(pieces) - 1, found.start()))
        elif not found["escaped"]:
            wanted = _OPENING[mark[-1]]
            partner = next((each for each in reversed(opened) if each[0] == wanted), None)
            if partner is None:
                continue
            del opened[opened.index(partner) :]  # with other kinds of brackets between the two
            _, first, place = partner
            pieces[first][0] = pieces[-1][0] = ""
            for piece in pieces[first:]:
                piece[1] *= float(found["weight"] or _FACTORS[wanted])
            spans.append((place, end))
    return Emphasis(_join([*pieces, [text[end:], 1.0]]), spans)


def _join(pieces: list[list]) -> list[list[tuple[str, float]]]:
    """Return the pieces by chunk; neighbours of one weight become one."""
    chunks = [[]]
    for part, weight in pieces:
        chunk = chunks[-1]
        if part is None:
            chunks.append([])
        elif part and chunk and chunk[-1][1] == weight:
            chunk[-1] = (chunk[-1][0] + part, weight)
        elif part:
            chunk.append((part, weight))
    return chunks


def escape(text: str) -> str:
    """Return a text whose brackets are no emphasis."""
    return re.sub(r"([()\[\]{}\\])", r"\\\1", text)
