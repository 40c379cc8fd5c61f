"""Find what is wrong with the files of a collection: unreadable images, and orphans both ways."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data.care.tool import Tool, list_files
from data.config import DataConfig
from data.facts import measure_files
from data.manifest import find_manifest
from data.manifest_formats import read_table
from data.scan import check_root, find_orphans, is_image_name, list_images, walk_folders
from data.tags.sidecars import list_sidecars
from utils.config.schema import PathText


class Verify(Tool):
    """Decode every image and compare files, sidecars and manifest; list what does not fit. report: of the list."""

    name: Literal["verify"]
    report: PathText

    def run(self, data: DataConfig) -> str:
        """List the faults. Raises UserError (`data.root`, `job.report`)."""
        root = check_root(data.root)
        images = sorted(image.path for image in list_images(root))
        facts = measure_files(root, images, data.max_pixels)
        faults = {path: fact.reason for path, fact in zip(images, facts) if fact.kind is not None}
        kinds = Counter(fact.kind for fact in facts if fact.kind is not None)
        for path, fault in (*_compare_rows(root, images), *_compare_sidecars(root)):
            kinds[fault] += 1
            faults[path] = f"{faults[path]}; {fault}" if path in faults else fault
        listing = list_files(self.report, self.name, faults)
        found = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common())
        return f"{len(images):,} images; {f'{found} ({listing})' if found else 'no fault'}"


def _compare_rows(root: Path, images: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the paths that only the manifest, or only the folder has."""
    if (manifest := find_manifest(root)) is not None:
        rows = set(read_table(manifest)["path"].to_pylist())
        yield from ((path, "an image without a row in the manifest") for path in images if path not in rows)
        gone = (path for path in sorted(rows.difference(images)) if not (root / path).is_file())
        yield from ((path, "a row of the manifest without a file") for path in gone)


def _compare_sidecars(root: Path) -> Iterator[tuple[str, str]]:
    """Yield sidecars without an image; and images without a sidecar, where any image has one."""
    bare, some = [], False
    for folder, _, names in walk_folders(root):
        images = {name for name in names if is_image_name(name)}
        without = [folder + name for name in images if not list_sidecars(name, names)]
        bare += without
        some = some or len(without) < len(images)
        yield from ((folder + name, "a sidecar without an image") for name in find_orphans(names - images, images))
    if some:
        yield from ((path, "an image without a sidecar") for path in sorted(bare))
