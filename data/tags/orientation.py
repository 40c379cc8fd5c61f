"""What a mirror does to tags: built once from a vocabulary and a small YAML map, as facts of a tagger; and the mirror.

    pairs: [[a, b]]             each is the mirror image of the other
    patterns:                   the two words of `swap` change places in what the regular expression `match` matches
      - {match: REGEX, swap: [left, right]}
    symmetric: [left_*]         unchanged, whatever the patterns say; * stands for any text
    never_flip: ["*_text"]      an image with such a tag is not mirrored

Every key may be absent. Patterns act on general and meta tags, not on names of characters, artists and works. A tag
whose mirror image is not in the vocabulary is dropped from a mirrored image, unless `symmetric` or `never_flip` has it.
The maps for booru tags and for the embedded glyphs are beside this file.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field
from torch import Tensor, nn

from utils import rng
from utils.config.messages import ConfigError, validate
from utils.config.schema import Strict
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.vocabulary import CATEGORIES, GENERAL, Vocabulary

log = get_logger(__name__)

MAPS = ("booru", "glyphs")
_TURNED = (GENERAL, CATEGORIES["meta"])
_SIDED = re.compile(r"(?<![a-z])(left|right)")  # not bright, copyright or upright
_SHOWN = 20  # names in a report
_COIN_DRAW = 0xF11B  # of utils/rng.py; tasks use small numbers

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

    pairs: list[_Two] = []
    patterns: list[Pattern] = []
    symmetric: list[str] = []
    never_flip: list[str] = []

    def mirror(self, name: str, category: int) -> str:
        """Return the name of a tag's mirror image, which may be its own."""
        for pair in reversed(self.pairs):  # so that a tag in two of them is found to be wrong
            if name in pair:
                return pair[1 - pair.index(name)]
        if category in _TURNED and not _any_of(self.symmetric).fullmatch(name):
            for pattern in self.patterns:
                name = pattern.apply(name)
        return name


def build_orientation(vocabulary: Vocabulary, name: str, key: str) -> dict[str, Any]:
    """Return what a mirror does to a vocabulary's outputs, as facts; name: `booru`, `glyphs`, or the path of a map.

    pairs: outputs that change places. dropped: outputs that a mirrored image loses. no_flip: outputs whose images are
    not mirrored. Logs the names with left or right of which the map says nothing.
    Raises UserError (`key`) that names the file: for a map that cannot be read, and for one by which the mirror image
    of a tag's mirror image is not the tag.
    """
    path = Path(__file__).with_name(f"orientation_{name}.yaml") if name in MAPS else Path(name)
    rules = _read(path, key)
    pairs, dropped, uncovered = [], [], []
    forbids, named = _any_of(rules.never_flip), _any_of([*rules.never_flip, *rules.symmetric])
    no_flip = [output for output, tag in enumerate(vocabulary.names) if forbids.fullmatch(tag)]
    for (category, tag), output in vocabulary.columns.items():
        mirror = rules.mirror(tag, category)
        other = vocabulary.columns.get((category, mirror))
        if mirror == tag:
            is_open = category in _TURNED and _SIDED.search(tag) and not named.fullmatch(tag)
            uncovered += [tag] if is_open else []
        elif (back := rules.mirror(mirror, category)) != tag:
            raise UserError(
                f"{key}: {path}: {tag!r} becomes {mirror!r}, and that {back!r}; write patterns that match both, name "
                "the tag in symmetric, or each tag in one of pairs"
            )
        elif other is None:
            dropped.append(output)
        elif output < other:
            pairs.append([output, other])
    log.debug(
        "%s=%s: in a mirrored image %d pairs of tags change places and %d are dropped; images of %d tags are not "
        "mirrored; with left or right, but not in the map: %s",
        key, name, len(pairs), len(dropped), len(no_flip), ", ".join(uncovered[:_SHOWN]) or "none",
    )  # fmt: skip
    return {"pairs": pairs, "dropped": dropped, "no_flip": no_flip}


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return the expression that matches these names, where * stands for any text; without names, nothing."""
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names) or r"(?!)")


def _read(path: Path, key: str) -> OrientationMap:
    """Read a map. Raises UserError (`key`)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return validate(values, OrientationMap)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{key}: {path} cannot be read as an orientation map ({' '.join(str(error).split())}); set booru, glyphs "
            "or the path of a YAML file"
        ) from None
    except ConfigError as error:
        raise UserError(f"{key}: {path}: " + "; ".join(error.problems)) from None


class Mirror(nn.Module):
    """Mirror half of the images, by their keys, and exchange the tags that a mirror exchanges.

    orientation: the facts of `build_orientation`, for `width` outputs. Its tensors are in no state dict.
    """

    def __init__(self, orientation: Mapping[str, Any], width: int) -> None:
        super().__init__()
        permutation = torch.arange(width)
        pairs = torch.tensor(orientation["pairs"], dtype=torch.long).view(-1, 2)
        permutation[pairs] = pairs.flip(1)
        dropped = torch.zeros(width, dtype=torch.bool)
        dropped[orientation["dropped"]] = True
        no_flip = torch.tensor(orientation["no_flip"], dtype=torch.long)
        for name, tensor in (("permutation", permutation), ("dropped", dropped), ("no_flip", no_flip)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, flip: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and targets [B, T], mirrored where it is due; without a host synchronisation.

        flip: int8 [B], -1 never, 1 always, 0 (or None) by a coin of the key [B], and never with a tag of `no_flip`.
        """
        coin = rng.uniform(keys, (), _COIN_DRAW) < 0.5
        mirrored = coin & ~(targets.index_select(1, self.no_flip) > 0.5).any(dim=1)
        if flip is not None:
            mirrored = torch.where(flip == 0, mirrored, flip > 0)
        turned = targets.index_select(1, self.permutation).masked_fill(self.dropped, 0)
        return (
            torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images),
            torch.where(mirrored.view(-1, 1), turned, targets),
        )
