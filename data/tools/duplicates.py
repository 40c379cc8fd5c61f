"""job=duplicates: find groups of images that show one picture, exclude all but one, and list contradictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.collection.duplicates import are_alike, group_duplicates, read_thumbnails
from data.config import DataConfig
from data.images.measure import FileFacts, measure_files
from data.layouts.table import TEST, show_some
from data.layouts.walk import check_root
from data.load import load_collection
from data.tags.spellings import fold
from data.tools.config import Duplicates
from data.tools.exclude import exclude_found, read_reasons
from data.tools.tool import list_files, refuse_shards, save_report
from utils.formats.spelling import RATING, parse_rating, parse_tag
from utils.io.files import Values
from utils.record.logging import log

Image = Values  # a row of the collection, its `FileFacts`, and `claims`


def exclude_duplicates(job: Duplicates, data: DataConfig) -> str:
    """Exclude all images except one of each group. Raises UserError (`data.root`, `job.report`)."""
    root = check_root(data.root)
    table = load_collection(data).table
    refuse_shards(root, table)
    found = {  # without images that other jobs exclude: a group must not keep such an image
        row["path"]: row for row, why in zip(table.to_pylist(), read_reasons(table))
        if row["weight"] or not why or why.startswith(f"{job.name}: ")
    }  # fmt: skip
    facts = dict(zip(found, measure_files(root, list(found), data.max_pixels)))
    reasons = {}
    others = {}
    rows = []
    groups = find_groups(facts, job.match)
    for number, group in enumerate(groups, start=1):
        images = [{**found[path], **facts[path]._asdict(), "claims": read_claims(found[path])} for path in group]
        images.sort(key=_rank)
        sort_out(images, reasons, others)
        for image in images:
            shown = {name: image[name] for name in ("path", "width", "height")}
            rows.append({"group": number, "kept": image["path"] not in reasons, **shown})
    figures = {"groups": len(groups), "images in them": len(rows), "that say something else": len(others)}
    save_report(Path(job.report) / job.name, str(root), figures, {"groups": rows}, {})
    listing = list_files(job.report, "same_picture", others)
    if others:
        log.warning(
            "%s images show the same picture as another image, but have another label, rating or tag, so they stay. %s "
            "lists them: correct the wrong ones, then run job=manifest and this job again", f"{len(others):,}", listing,
        )  # fmt: skip
    return exclude_found(job, data, reasons)


def sort_out(images: Sequence[Image], excluded: dict[str, str], contrary: dict[str, str]) -> None:
    """Add the reasons why images of a group are excluded, and the contradictions of the other images; both by path.

    images: the most worth keeping first. An image is excluded if it is like a kept image that has all its claims. The
    ends of a long chain are not alike, so several images may be kept.
    """
    pictures = read_thumbnails([image["thumbnail"] for image in images])
    kept = []
    for number, image in enumerate(images):
        is_alike = are_alike(pictures[[number]], pictures[kept])
        alike = [images[other] for other, same in zip(kept, is_alike) if same]
        wider = [other["path"] for other in alike if image["claims"] <= other["claims"]]
        if wider and image["split"] != TEST:
            excluded[image["path"]] = f"a duplicate: {wider[0]} is kept"
            continue
        kept.append(number)
        if alike and not wider:
            there = alike[0]["claims"]
            less = show_some(sorted(there - image["claims"])) or "nothing more"
            more = show_some(sorted(image["claims"] - there))
            contrary[image["path"]] = f"here {more}; in {alike[0]['path']} {less}"


def _rank(image: Image) -> tuple[Any, ...]:
    """Sort by test split, then by the number of claims, then by caption, then by size."""
    pixels = image["width"] * image["height"]
    is_other = image["split"] != TEST
    return is_other, -len(image["claims"]), not image["caption"], -pixels, -image["size"], image["path"]


def read_claims(row: Image) -> frozenset[str]:
    """Return the claims of a row about its picture: label, rating and tags, in one spelling."""
    claims = {f"label {row['label']}"} if row["label"] else set()
    for tag in map(parse_tag, (*row["tags"], f"rating:{row['rating'] or ''}")):
        if tag.name:
            is_rating = tag.category == RATING
            claims.add(f"rating {parse_rating(tag.name)}" if is_rating else f"tag {fold(tag.name)}")
    return frozenset(claims)


def find_groups(facts: Mapping[str, FileFacts], match: str) -> list[list[str]]:
    """Return the paths of each group with at least two images, the largest group first; match: see `Duplicates`."""
    drawn = {path: fact for path, fact in facts.items() if fact.thumbnail}
    keys = [fact.sha256 for fact in drawn.values()]
    if match == "near":
        keys = group_duplicates([fact.thumbnail for fact in drawn.values()]).tolist()
    members = {}
    for path, key in zip(drawn, keys):
        members.setdefault(key, []).append(path)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))
