"""What a mirror does to tags: built once from a vocabulary and a small YAML map, as facts of a tagger.

    mode: balanced              or strict, or permissive
    pairs: [[a, b]]             each is the mirror image of the other
    patterns:                   the two words of `swap` change places in what the regular expression `match` matches
      - {match: REGEX, swap: [left, right]}
    symmetric: [left_*]         unchanged, whatever the patterns say; * stands for any text
    never_flip: ["*_text"]      an image with such a tag is not mirrored

Every key may be absent. Patterns act on general and meta tags, not on names of characters, artists and works. A tag
whose mirror image is not in the vocabulary is dropped from a mirrored image (balanced), forbids the mirror (strict), or
stays (permissive). The maps for booru tags and for the embedded glyphs are beside this file.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from utils.config.messages import validation_problems
from utils.config.schema import Strict
from utils.errors import UserError
from utils.vocabulary import CATEGORIES, GENERAL, Vocabulary

MAPS = ("booru", "glyphs")
_TURNED = (GENERAL, CATEGORIES["meta"])
_SIDED = re.compile(r"(?<![a-z])(left|right)")  # not bright, copyright or upright
_SHOWN = 20  # names in a report


_Two = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)]


class Pattern(Strict):
    """A regular expression, and the two words that change places in what it matches."""

    match: re.Pattern[str]
    swap: _Two

    def apply(self, name: str) -> str:
        """Return a name's mirror image."""
        words = "|".join(map(re.escape, sorted(self.swap, key=len, reverse=True)))
        other = dict(zip(self.swap, reversed(self.swap)))
        return self.match.sub(lambda found: re.sub(words, lambda word: other[word[0]], found[0]), name)


class OrientationMap(Strict):
    """The map; its keys are explained above."""

    mode: Literal["strict", "balanced", "permissive"] = "balanced"
    pairs: list[_Two] = []
    patterns: list[Pattern] = []
    symmetric: list[str] = []
    never_flip: list[str] = []

    @cached_property
    def _partners(self) -> dict[str, str]:
        return {first: second for pair in self.pairs for first, second in (pair, pair[::-1])}

    @cached_property
    def _symmetric(self) -> re.Pattern[str]:
        return _any_of(self.symmetric)

    def mirror(self, name: str, category: int) -> str:
        """Return the name of a tag's mirror image, which may be its own."""
        if name in self._partners:
            return self._partners[name]
        if category in _TURNED and not self.is_symmetric(name):
            for pattern in self.patterns:
                name = pattern.apply(name)
        return name

    def is_symmetric(self, name: str) -> bool:
        """Return whether the map states that a mirror does not change a tag."""
        return self._symmetric.fullmatch(name) is not None


@dataclass(frozen=True)
class Orientation:
    """What a mirror does to the outputs of a vocabulary.

    pairs: outputs that change places. dropped: outputs that a mirrored image loses. no_flip: outputs whose images are
    not mirrored. uncovered: names with left or right of which the map says nothing.
    """

    pairs: list[tuple[int, int]]
    dropped: list[int]
    no_flip: list[int]
    uncovered: list[str]

    def facts(self) -> dict[str, Any]:
        """Return what data/tags/mirror.py needs, for the facts of a task."""
        return {"pairs": [list(pair) for pair in self.pairs], "dropped": self.dropped, "no_flip": self.no_flip}

    def describe(self) -> str:
        """Return the numbers and the uncovered names in a line."""
        names = ", ".join(self.uncovered[:_SHOWN]) + (", ..." if len(self.uncovered) > _SHOWN else "")
        return (
            f"in a mirrored image {len(self.pairs)} pairs of tags change places and {len(self.dropped)} tags are "
            f"dropped; images of {len(self.no_flip)} tags are not mirrored; with left or right, but not in the map: "
            f"{names or 'none'}"
        )


def build_orientation(vocabulary: Vocabulary, name: str, key: str) -> Orientation:
    """Return what a mirror does to a vocabulary's tags; name: `booru`, `glyphs`, or the path of a map.

    Raises UserError (`key`) that names the file: for a map that cannot be read, and for one by which the mirror image
    of a tag's mirror image is not the tag.
    """
    path = Path(__file__).with_name(f"orientation_{name}.yaml") if name in MAPS else Path(name)
    rules = _read(path, key)
    pairs, alone, uncovered = [], [], []
    stays = _any_of(rules.never_flip)
    no_flip = {output for output, tag in enumerate(vocabulary.names) if stays.fullmatch(tag)}
    for output, (tag, category) in enumerate(zip(vocabulary.names, vocabulary.categories)):
        mirror = rules.mirror(tag, category)
        if mirror == tag:
            named = output in no_flip or rules.is_symmetric(tag) or category not in _TURNED
            uncovered += [tag] if _SIDED.search(tag) and not named else []
            continue
        if (back := rules.mirror(mirror, category)) != tag:
            raise UserError(
                f"{key}: {path}: {tag!r} becomes {mirror!r}, and that {back!r}; write patterns that match both, name "
                "the tag in symmetric, or each tag in one of pairs"
            )
        other = vocabulary.columns.get((category, mirror))
        if other is None:
            alone.append(output)
        elif output < other:
            pairs.append((output, other))
    if rules.mode == "strict":
        no_flip.update(alone)
    return Orientation(pairs, alone if rules.mode == "balanced" else [], sorted(no_flip), uncovered)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return the expression that matches these names, where * stands for any text; without names, nothing."""
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names) or r"(?!)")


def _read(path: Path, key: str) -> OrientationMap:
    """Read a map. Raises UserError (`key`)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return OrientationMap.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{key}: {path} cannot be read as an orientation map ({' '.join(str(error).split())}); set booru, glyphs "
            "or the path of a YAML file"
        ) from None
    except ValidationError as error:
        raise UserError(f"{key}: {path}: " + "; ".join(validation_problems(error, values, OrientationMap))) from None
