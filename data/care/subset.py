"""Copy a part of a collection, with its sidecars and the rows of its manifest, to another folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from data.care.config import FilterConfig, SubsetConfig
from data.care.filter import find_failing
from data.care.moves import add_sidecars, copy_rows, find_parquet
from data.care.work import Work
from data.manifest_formats import PARQUET
from data.open import load_collection
from data.tags.names import parse_tag
from data.tags.sidecars import read_text
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically
from utils.ranks.processes import map_items
from utils.record.progress import track


def copy_images(work: Work, wanted: SubsetConfig, rules: FilterConfig) -> str:
    """Copy the images that are listed, have all the tags and break no rule of `filter`; nothing is overwritten.

    A file that is there with the same size and time of change is passed over, so a killed job goes on where it was.
    Raises UserError (`subset.to`, `subset.listed`, `data.root`).
    """
    target = _check_target(work, wanted.to)
    collection = load_collection(work.data)
    paths = collection.table["path"].to_pylist()
    failing = find_failing(work, collection, rules)
    listed = None if wanted.listed is None else _read_list(Path(wanted.listed).expanduser(), paths)
    needed = {parse_tag(tag).name for tag in wanted.tags}
    chosen = {
        path: ""
        for path, tags in zip(paths, collection.table["tags"].to_pylist())
        if path not in failing
        and (listed is None or path in listed)
        and needed <= {parse_tag(tag).name for tag in (tags if needed else ())}
    }
    manifest = find_parquet(work.root)
    files = list(add_sidecars(work.root, chosen))
    pairs = [(work.root / path, target / path) for path in files]
    with output_errors("subset.to", target):
        results = map_items(_copy_file, pairs, lambda pair: False)
        copied = sum(track(results, len(pairs), "copying files"))
        if manifest is not None:
            copy_rows(manifest, target / PARQUET, chosen, keep=True)
    return f"{len(chosen):,} of {len(paths):,} images are in {target}, {copied:,} of {len(files):,} files copied now"


def _check_target(work: Work, to: str | None) -> Path:
    if to is None:
        raise UserError("subset.to: job=copy needs it; set it to the folder that the images are copied to")
    target, root = Path(to).expanduser().resolve(), work.root.resolve()
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise UserError(f"subset.to: {to!r} is inside data.root, or data.root inside it; name a folder beside it")
    return target


def _read_list(file: Path, paths: Sequence[str]) -> set[str]:
    """Read paths, one a line. Raises UserError (`subset.listed`) where the collection lacks one."""
    if not file.is_file():
        raise UserError(f"subset.listed: {str(file)!r} is no file; give a text file of paths in data.root, one a line")
    listed = {line.strip() for line in read_text(file).splitlines() if line.strip()}
    if unknown := listed.difference(paths):
        raise UserError(
            f"subset.listed: {len(unknown):,} lines of {str(file)!r} name no image of the collection, such as "
            f"{min(unknown)!r}; write paths relative to data.root, with / between folders"
        )
    return listed


def _copy_file(pair: tuple[Path, Path]) -> bool:
    """Copy a file unless its copy is there; returns whether it was copied. Raises UserError for another file there."""
    source, target = pair
    if target.exists():
        there, here = target.stat(), source.stat()
        if (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns):
            return False
        raise UserError(f"subset.to: {str(target)!r} is another file than {str(source)!r}; name an empty folder")
    write_atomically(target, lambda temporary: shutil.copy2(source, temporary), flush=False)
    return True
