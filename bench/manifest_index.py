"""Indexing a Parquet manifest of ten million made rows, opening the index, and what a further worker costs.

python bench/manifest_index.py [rows=10000000] [quick]          (on an idle machine; a minute, and 8 GB of disk)

Each row has a path, a size, a checksum, a split, a label, width and height. The files are there, 1,000 a folder, as
hard links to empty ones. Each figure is of a process of its own; memory is its peak, or what it adds.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.commands import ROOT, read_number, read_settings
from utils.text_table import align_columns

PER_FOLDER, PART, QUICK = 1000, 1_000_000, 20_000
LINKS = 50_000  # of one file; ext4 allows 65,000
PARTS = ("index", "again", "open", "worker")


def write_manifest(root, count):
    """Write the manifest and its files."""
    writer = None
    for start in range(0, count, PART):
        numbers = np.arange(start, min(count, start + PART))
        folders = [f"{number // PER_FOLDER:06d}" for number in numbers]
        names = [f"{folder}/{number:09d}.jpg" for folder, number in zip(folders, numbers)]
        columns = {
            "path": names, "size": np.zeros_like(numbers), "sha256": [f"{number:064x}" for number in numbers],
            "split": np.where(numbers % 100 == 0, "val", "train"), "label": folders, "width": numbers % 4000 + 1,
            "height": numbers % 3000 + 1,
        }  # fmt: skip
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(root / "manifest.parquet", table.schema)
        writer.write_table(table)
    writer.close()
    for first in range(0, count, PER_FOLDER):
        folder = root / f"{first // PER_FOLDER:06d}"
        folder.mkdir()
        if first % LINKS == 0:
            (whole := root / f"linked{first}").touch()
        for number in range(first, min(count, first + PER_FOLDER)):
            os.link(whole, folder / f"{number:09d}.jpg")


def measure(part, root, cache):
    """Do one part; returns its seconds and MiB."""
    from data.collection import index_collection, open_collection

    def index():
        return index_collection(str(root), validation_fraction=0.1, cache=cache)

    arrow = None if part == "index" else index()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if part in ("index", "again"):
        index()
    else:
        collection = open_collection(str(root), arrow)
    seconds = time.perf_counter() - started
    if part == "worker":  # a fork that reads rows, as a loader's worker does
        read = np.random.default_rng(0).integers(0, len(collection), 10_000).tolist()  # its import would count, too
        started, (read_end, write_end) = time.perf_counter(), os.pipe()
        if os.fork() == 0:
            before = own_kib()
            for row in read:
                collection.row(row)
            os.write(write_end, str(own_kib() - before).encode())
            os._exit(0)
        os.wait()
        return time.perf_counter() - started, int(os.read(read_end, 100)) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (peak if part == "index" else peak - used) / 1024


def own_kib():
    """Return the memory that is this process's alone; pages of the index are the system's, and shared."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def main():
    if sys.argv[1:2] == ["part"]:
        sys.stdout.write(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    given, quick = read_settings(rows="10000000")
    count = QUICK if quick else int(read_number("rows", given["rows"], float))
    out = ROOT / "outputs/bench" / ("quick/manifest_index" if quick else "manifest_index")
    root = out / f"images_{count}"
    if not (root / "done").exists():
        root.mkdir(parents=True, exist_ok=True)
        write_manifest(root, count)
        (root / "done").touch()
    shutil.rmtree(out / "cache", ignore_errors=True)
    rows, found = [("part", "seconds", "MiB")], {}
    for part in PARTS:
        command = [sys.executable, __file__, "part", part, str(root), str(out / "cache")]
        found[part] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append((part, f"{found[part][0]:.3f}", f"{found[part][1]:.1f}"))
    path = out.with_suffix(".json")
    path.write_text(json.dumps({"rows": count, "quick": quick, **found}, indent=2) + "\n")
    sys.stdout.write(f"{count:,} rows\n{align_columns(rows)}\n{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
