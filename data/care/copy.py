"""Copy a part of a collection, with its sidecars and the rows of its manifest, to another folder."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data.care.filter import Rules, find_failing
from data.care.tool import Tool
from data.config import DataConfig
from data.manifest import find_manifest
from data.manifest_formats import PARQUET, read_parquet
from data.open import load_collection
from data.scan import check_root, is_image_name, list_folder
from data.tags.names import parse_tag
from data.tags.sidecars import list_sidecars, read_text
from utils.config.schema import PathText
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically
from utils.ranks.processes import map_items
from utils.record.progress import track


class Copy(Tool, Rules):
    """Copy the images that are listed, have all the tags and break no rule; nothing is overwritten.

    to: the folder. listed: a text file of paths, one a line. A file that is there with the same size and time of change
    is passed over, so a killed job goes on where it was.
    """

    name: Literal["copy"]
    to: PathText
    listed: PathText | None
    tags: list[str]

    def run(self, data: DataConfig) -> str:
        """Copy. Raises UserError (`job.to`, `job.listed`, `data.root`)."""
        root = check_root(data.root)
        target = check_target(root, self.to)
        manifest = find_manifest(root)
        if manifest is not None and manifest.name != PARQUET:
            raise UserError(
                f"data.root: of {str(manifest)!r} no rows can be copied; write it as {PARQUET} (pandas or pyarrow do)"
            )
        collection = load_collection(data)
        paths = collection.table["path"].to_pylist()
        failing = find_failing(collection, self, data)
        listed = None if self.listed is None else _read_list(Path(self.listed).expanduser(), paths)
        needed = {parse_tag(tag).name for tag in self.tags}
        chosen = [
            path
            for path, tags in zip(paths, collection.table["tags"].to_pylist())
            if path not in failing
            and (listed is None or path in listed)
            and needed <= {parse_tag(tag).name for tag in (tags if needed else ())}
        ]
        files = [name for path, sidecars in with_sidecars(root, chosen).items() for name in (path, *sidecars)]
        copied = copy_files(root, target, files)
        if manifest is not None:
            _copy_rows(manifest, target / PARQUET, set(chosen))
        return (
            f"{len(chosen):,} of {len(paths):,} images are in {target}, {copied:,} of {len(files):,} files copied now"
        )


def check_target(root: Path, to: str) -> Path:
    """Return the folder `job.to`. Raises UserError where it is inside the collection, or the collection inside it."""
    target, inside = Path(to).expanduser().resolve(), root.resolve()
    if target.is_relative_to(inside) or inside.is_relative_to(target):
        raise UserError(f"job.to: {to!r} is inside data.root, or data.root inside it; name a folder beside it")
    return target


def with_sidecars(root: Path, paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the sidecars of each image, but for those that belong to an image that is not named too."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        folder, slash, _ = path.rpartition("/")
        by_folder.setdefault(folder + slash, []).append(path)
    found: dict[str, list[str]] = {}
    for folder, named in by_folder.items():
        names, ours = {entry.name for entry in list_folder(root / folder)}, set(named)
        others = (name for name in names if is_image_name(name) and folder + name not in ours)
        theirs = {file for name in others for file in list_sidecars(name, names)}
        for path in named:
            own = list_sidecars(path.removeprefix(folder), names)
            found[path] = [folder + name for name in own if name not in theirs]
    return found


def copy_files(root: Path, target: Path, files: Sequence[str]) -> int:
    """Copy files of a collection to the same places below `target`; return how many were not there."""
    pairs = [(root / path, target / path) for path in files]
    with output_errors("job.to", target):
        return sum(track(map_items(_copy_file, pairs, lambda pair: False), len(pairs), "copying files"))


def is_there(source: Path, target: Path) -> bool:
    """Return whether a target has the source's time of change. Raises UserError (`job.to`) for another file there."""
    if not target.exists():
        return False
    if target.stat().st_mtime_ns != source.stat().st_mtime_ns:
        raise UserError(f"job.to: {str(target)!r} is another file than {str(source)!r}; name an empty folder")
    return True


def _copy_file(pair: tuple[Path, Path]) -> bool:
    source, target = pair
    if is_there(source, target):
        if target.stat().st_size != source.stat().st_size:
            raise UserError(f"job.to: {str(target)!r} is another file than {str(source)!r}; name an empty folder")
        return False
    write_atomically(target, lambda temporary: shutil.copy2(source, temporary), flush=False)
    return True


def _copy_rows(manifest: Path, target: Path, paths: Iterable[str]) -> None:
    table = read_parquet(manifest)
    rows = table.filter(pa.array([path in paths for path in table["path"].to_pylist()]))
    with output_errors("job.to", target):
        write_atomically(target, lambda file: pq.write_table(rows, file, compression="zstd"))


def _read_list(file: Path, paths: Sequence[str]) -> set[str]:
    """Read paths, one a line. Raises UserError (`job.listed`) where the collection lacks one."""
    if not file.is_file():
        raise UserError(f"job.listed: {str(file)!r} is no file; give a text file of paths in data.root, one a line")
    listed = {line.strip() for line in read_text(file).splitlines() if line.strip()}
    if unknown := listed.difference(paths):
        raise UserError(
            f"job.listed: {len(unknown):,} lines of {str(file)!r} name no image of the collection, such as "
            f"{min(unknown)!r}; write paths relative to data.root, with / between folders"
        )
    return listed
