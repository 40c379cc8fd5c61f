"""The report on the files of a collection: unreadable images, and surprising traits of the others.

data/manifest_writer.py returns it, and prepare.py job=manifest logs it.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.facts import Facts
from utils.canvas import DEFAULT, Background
from utils.io.files import write_atomically
from utils.record.logging import get_logger

log = get_logger(__name__)

_NAMED = 20  # unreadable images in the log
UNREADABLE = "manifest.unreadable.jsonl"  # written beside the manifest, one {"path", "reason"} a line
# How the reader treats the traits that `data.facts.measure_file` finds.
_TREATMENT = {
    "several frames": "only the first is read",
    "CMYK": "converted to RGB without an ink profile",
    "16 bits per channel": "scaled to 8",
    "rotated by EXIF": "rotated upright",
    "transparent": "placed on data.background, {background}",
    "named as another format": "read as what they are",
    "broken metadata": "ignored",
}


@dataclass(frozen=True)
class ManifestReport:
    """What `write_manifest` found; the counts have the most frequent first, `unreadable` holds (path, reason).

    kinds: of the unreadable images, by the kind of fault. traits: of the readable ones, what is converted,
    dropped or odd (an image may have several), each with the first image that has it. Both need verify. listing: the
    file that names every unreadable image, None where there is none. groups: the numbers of images that are
    near-duplicates of one another, the largest first; None where nobody asked.
    """

    path: Path
    rows: int
    splits: dict[str, int]
    classes: dict[str, int]
    tags: dict[str, int]
    unreadable: list[tuple[str, str]]
    kinds: dict[str, int]
    traits: dict[str, tuple[int, str]]
    listing: Path | None
    groups: list[int] | None = None

    def log(self, background: Background = DEFAULT) -> None:
        """Log which images are unreadable, traits that their owner may not expect, near-duplicates, and the counts."""
        for path, reason in self.unreadable[:_NAMED]:
            log.warning("unreadable image %s: %s", path, reason)
        if self.unreadable:
            kinds = ", ".join(f"{kind}: {count:,}" for kind, count in self.kinds.items())
            log.warning(
                "%s of %s images are unreadable (%s) and weigh 0 in the manifest; %s names each: replace or remove "
                "them, then make the manifest again",
                f"{len(self.unreadable):,}", f"{self.rows:,}", kinds, self.listing,
            )  # fmt: skip
        for trait, (count, path) in self.traits.items():
            treatment = _TREATMENT[trait].format(background=background)
            log.info("%s: %s images, %s (such as %s)", trait, f"{count:,}", treatment, path)
        if self.groups is not None:
            log.info(
                "%s of %s images are near-duplicates of others, some mirrored: %s groups%s (column group)",
                f"{sum(self.groups):,}", f"{self.rows:,}", f"{len(self.groups):,}",
                f", the largest of {self.groups[0]:,}" if self.groups else "",
            )  # fmt: skip
        splits = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        log.info(
            "wrote %s: %s images (%s), %d classes, %d tags, %d unreadable",
            self.path, f"{self.rows:,}", splits, len(self.classes), len(self.tags), len(self.unreadable),
        )  # fmt: skip


def count_groups(groups: pa.ChunkedArray) -> list[int]:
    """Return the sizes of the groups of more than one image, the largest first."""
    counts = pc.value_counts(groups.drop_null()).field("counts").to_pylist()
    return sorted((count for count in counts if count > 1), reverse=True)


def count_kinds(facts: list[Facts]) -> dict[str, int]:
    """Return how many files are unreadable, by the kind of fault; the most frequent first."""
    kinds = Counter(fact.kind for fact in facts if fact.kind is not None)
    return dict(kinds.most_common())


def count_traits(paths: list[str], facts: list[Facts]) -> dict[str, tuple[int, str]]:
    """Return how many images have each trait, and the first of them; the most frequent first."""
    bearers: dict[str, list[str]] = {}
    for path, fact in zip(paths, facts):
        for trait in fact.traits:
            bearers.setdefault(trait, []).append(path)
    return {trait: (len(named), named[0]) for trait, named in sorted(bearers.items(), key=lambda item: -len(item[1]))}


def list_unreadable(file: Path, unreadable: list[tuple[str, str]]) -> Path | None:
    """Write one JSON line for each unreadable image; without any, remove what an earlier call has left."""
    if not unreadable:
        file.unlink(missing_ok=True)
        return None
    lines = [json.dumps({"path": path, "reason": reason}, ensure_ascii=False) + "\n" for path, reason in unreadable]
    write_atomically(file, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    return file
