"""No sentence of README, docs/ and the pages beside them has more than 30 words outside code and tables."""

import re

import pytest

from tests.support import ROOT

MOST_WORDS = 30
LATER = {"README.md", "collections.md", "evaluation.md", "sdxl.md", "tagger.md"}  # being written
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name not in LATER]
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
NO_PROSE = re.compile(
    r"(?:^|\n) *\n(?: {4}.*\n)+|^ *(?:\||#|!\[).*$", re.MULTILINE
)  # code, a table, a heading, a picture
ITEM = re.compile(r"^\s*(?:[-*>]|\d+\.) ", re.MULTILINE)
END = re.compile(r"(?<=[.!?])[)*\"']* +")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|al|cf|approx)\.(?= )", re.IGNORECASE)


def list_sentences(text):
    """Yield the sentences of a page: code in a line is one word, a link has the words of its text."""
    text = NO_PROSE.sub("\n", FENCED.sub("", text))
    text = ITEM.sub("\n\n", text)
    text = re.sub(r"(`+).+?\1", "`code`", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n", ABBREVIATION.sub("abbr", text)):
        yield from END.split(" ".join(paragraph.split()))


def count_words(sentence):
    """Return the number of words and figures; signs between them are none."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One two. Three (four\nfive). `a b` six", [2, 3, 2]),
        ("See [one two](a.md#b), e.g. three of 0.5 -> 1.5.", [8]),
        ("- one\n  two\n- three\n\n| a | b |\n\n    code\n\n```bash\nx y\n```\nfour", [2, 1, 1]),
    ],
)
def test_sentences_are_told_apart(text, words):
    assert [count_words(sentence) for sentence in list_sentences(text) if sentence] == words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page):
    sentences = list_sentences(page.read_text(encoding="utf-8"))
    long = [f"{count_words(text)} words: {text}" for text in sentences if count_words(text) > MOST_WORDS]
    assert long == [], f"{page.relative_to(ROOT)}: write sentences of at most {MOST_WORDS} words"
