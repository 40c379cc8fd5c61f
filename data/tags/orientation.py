"""How a mirror image changes tags: facts of a tagger, built from a vocabulary and a small YAML map; and the mirror.

    pairs: [[a, b]]             each is the mirror image of the other
    patterns:                   the two words of `swap` are exchanged in every match of the regular expression `match`
      - {match: REGEX, swap: [left, right]}
    symmetric: [left_*]         unchanged, even if a pattern matches; * matches any text
    never_flip: ["*_text"]      an image with such a tag is not mirrored

All keys are optional. Patterns act on general and meta tags, not on names of characters, artists and works. A mirrored
image loses a tag if the mirror image of the tag is not in the vocabulary, unless `symmetric` or `never_flip` has it.
The maps for booru tags and for the embedded glyphs are in this folder.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from utils import rng
from utils.config.bounds import Name, Two
from utils.config.messages import ConfigError, validate
from utils.config.schema import Strict
from utils.errors import UserError, about
from utils.formats.spelling import CATEGORIES, GENERAL
from utils.formats.vocabulary import Vocabulary
from utils.io.files import Json, Values, readable
from utils.record.logging import log

MAPS = ("booru", "glyphs")
_MIRRORED = (GENERAL, CATEGORIES["meta"])
_COIN_DRAW = 0xF11B  # draw number for utils/rng.py; tasks use small numbers


class Pattern(Strict):
    """A regular expression, and the two words that are exchanged in its matches."""

    match: re.Pattern[str]
    swap: Two[Name]

    def apply(self, name: str) -> str:
        """Return the mirror image of a name."""
        words = "|".join(map(re.escape, sorted(self.swap, key=len, reverse=True)))
        other = dict(zip(self.swap, reversed(self.swap)))
        return self.match.sub(lambda found: re.sub(words, lambda word: other[word[0]], found[0]), name)


class OrientationMap(Strict):
    """The map; the module docstring explains its keys."""

    pairs: list[Two[Name]] = []
    patterns: list[Pattern] = []
    symmetric: list[str] = []
    never_flip: list[str] = []

    def mirror(self, name: str, category: int) -> str:
        """Return the mirror image of a tag, which may be the tag itself."""
        for pair in reversed(self.pairs):  # a tag in two pairs is then detected
            if name in pair:
                return pair[1 - pair.index(name)]
        if category in _MIRRORED and not _any_of(self.symmetric).fullmatch(name):
            for pattern in self.patterns:
                name = pattern.apply(name)
        return name


def build_orientation(vocabulary: Vocabulary, name: str) -> Json:
    """Return how a mirror image changes the outputs of a vocabulary; name: `booru`, `glyphs`, or the path of a map.

    pairs: outputs that are exchanged. dropped: outputs that a mirrored image loses. no_flip: outputs whose images are
    not mirrored.
    Raises UserError (`task.orientation`) with the file if a map cannot be read, or if mirroring a tag twice gives
    another tag.
    """
    path = Path(__file__).with_name(f"orientation_{name}.yaml") if name in MAPS else Path(name)
    with about("task.orientation"), readable(path, "orientation map"):
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    try:
        rules = validate(values, OrientationMap)
    except ConfigError as error:
        raise UserError(f"task.orientation: {path}: " + "; ".join(error.args)) from None
    pairs = []
    dropped = []
    forbids = _any_of(rules.never_flip)
    no_flip = [output for output, tag in enumerate(vocabulary.names) if forbids.fullmatch(tag)]
    for (category, tag), output in vocabulary.columns.items():
        mirror = rules.mirror(tag, category)
        other = vocabulary.columns.get((category, mirror))
        if (back := rules.mirror(mirror, category)) != tag:
            raise UserError(
                f"task.orientation: {path}: {tag!r} becomes {mirror!r}, then {back!r}; write patterns that match both, "
                "name the tag in symmetric, or each tag in one of pairs"
            )
        if other is None:
            dropped.append(output)
        elif output < other:
            pairs.append([output, other])
    log.debug(
        "task.orientation=%s: a mirrored image exchanges %d pairs of tags and drops %d tags; images with one of %d "
        "tags are not mirrored", name, len(pairs), len(dropped), len(no_flip),
    )  # fmt: skip
    return {"pairs": pairs, "dropped": dropped, "no_flip": no_flip}


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return an expression that matches any of these names (* matches any text); without names, nothing."""
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names) or r"(?!)")


class Mirror(nn.Module):
    """Mirror half of the images, chosen by their keys, and adapt their tags.

    orientation: the facts of `build_orientation`, for `width` outputs. Its tensors are not in the state dict; `pairs`
    is a permutation.
    """

    def __init__(self, orientation: Values, width: int) -> None:
        super().__init__()
        permutation = list(range(width))
        for first, second in orientation["pairs"]:
            permutation[first] = second
            permutation[second] = first
        for name, outputs in {**orientation, "pairs": permutation}.items():
            indices = torch.tensor(outputs, dtype=torch.long, device="cpu")  # with values in a dry run, too
            self.register_buffer(name, indices, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and targets [B, T], some mirrored by their keys [B]; without a host sync."""
        coin = rng.uniform(keys, (), _COIN_DRAW) < 0.5
        mirrored = coin & ~(targets.index_select(1, self.no_flip) > 0.5).any(dim=1)
        exchanged = targets.index_select(1, self.pairs).index_fill(1, self.dropped, 0)
        return (
            torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images),
            torch.where(mirrored.view(-1, 1), exchanged, targets),
        )
