"""No sentence of README, docs/ and the pages beside them has more than 30 words outside code and tables.

The tests that they name are there.
"""

import re

import pytest

from tests.support import ROOT

MOST_WORDS = 30
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"\n *\n(?: {4}.*\n)+")
NO_PROSE = re.compile(r"^ *(?:\||#|!\[).*$", re.MULTILINE)  # a table, a heading, a picture
CODE = re.compile(r"(`+).+?\1", re.DOTALL)
ITEM = re.compile(r"^\s*(?:[-*>]|\d+\.) ", re.MULTILINE)
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|al|cf|approx)\.(?= )", re.IGNORECASE)
END = re.compile(r"(?<=[.!?])[)*\"']* +")


def list_sentences(text):
    """Yield the number of words of each sentence, and the sentence: code in a line is a word, a link its text."""
    for pattern, words in ((FENCED, ""), (INDENTED, "\n\n"), (NO_PROSE, ""), (CODE, "code"), (ITEM, "\n\n")):
        text = pattern.sub(words, text)
    text = ABBREVIATION.sub("abbreviation", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in END.split(" ".join(paragraph.split())):
            yield len(re.findall(r"\S*\w\S*", sentence)), sentence


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page):
    sentences = list_sentences(page.read_text("utf-8"))
    long = [f"{count} words: {sentence}" for count, sentence in sentences if count > MOST_WORDS]
    assert long == [], f"{page.relative_to(ROOT)}: write sentences of at most {MOST_WORDS} words"


def test_the_tests_that_pages_name_are_there():
    named = {name for page in PAGES for name in re.findall(r"\b(?:test|slow)_\w+\.py", page.read_text("utf-8"))}
    assert named <= {file.name for file in (ROOT / "tests").rglob("*.py")}
