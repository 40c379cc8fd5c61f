"""Copy a collection or a part of it to another folder, with sidecars and manifest rows."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.collection.choose import choose_part
from data.collection.search import find_rows
from data.config import DataConfig
from data.layouts.manifest import read_sources, read_table, save_manifest
from data.layouts.names import PARQUET
from data.layouts.scan import TableChoice, list_descriptions
from data.layouts.tables import read_parquet
from data.layouts.unused import Unused
from data.layouts.walk import check_root, find_manifest
from data.load import load_collection
from data.tools.config import Copy
from data.tools.tool import refuse_shards
from utils.errors import UserError
from utils.io.files import remove_temporary, write_atomically
from utils.io.journal import open_journal
from utils.io.memo import in_threads
from utils.record.progress import track


def copy_images(job: Copy, data: DataConfig) -> str:
    """Copy. Raises UserError (`job.to`, `job.find`, `data.root`)."""
    root = check_root(data.root)
    target = Path(job.to).resolve()
    if target.is_relative_to(root.resolve()) or root.resolve().is_relative_to(target):
        raise UserError(f"job.to: {job.to!r} is inside data.root, or data.root inside it; set another folder")
    collection = load_collection(data)
    refuse_shards(data.root, collection.table)
    rows = np.arange(len(collection)) if job.find is None else find_rows(collection, job.find, "job.find")
    images = collection.table["path"].take(choose_part(collection, rows, job)).to_pylist()
    others = list_descriptions(root, images)
    files = [*images, *others]
    with open_journal("job.to", target, is_folder=True):
        remove_temporary({(target / file).parent for file in files})
        copied = in_threads(functools.partial(_copy_file, root, target), files)
        new = sum(track(copied, len(files), "copying files"))
        if manifest := find_manifest(root):
            is_ours = manifest.name == PARQUET
            table = read_parquet(manifest) if is_ours else read_table(manifest, Unused(), TableChoice())
            table = table.filter(pc.is_in(table["path"], pa.array(images, pa.string())))
            save_manifest(target, table, read_sources(manifest))
    found = f"{len(images):,} of {len(collection):,} images are in {target}"
    return f"{found}; copied {new:,} of {len(files):,} files"


def _copy_file(root: Path, target: Path, path: str) -> bool:
    """Copy a file; return whether it was not there yet. Raises UserError (`job.to`) if the copy exists and differs."""
    source = root / path
    copy = target / path
    if copy.exists():
        ours = source.stat()
        theirs = copy.stat()
        if (ours.st_mtime_ns, ours.st_size) != (theirs.st_mtime_ns, theirs.st_size):
            raise UserError(f"job.to: {str(copy)!r} differs from {str(source)!r}; set an empty folder")
        if ours.st_ctime_ns < theirs.st_ctime_ns:  # else the original was changed, with its old time and size
            return False
    write_atomically(copy, functools.partial(shutil.copy2, source), flush=False)
    return True
