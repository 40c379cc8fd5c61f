"""Opening what a tagger starts with: the tags of five million made rows, and a vocabulary of 100,000 tags.

python bench/tag_index.py [quick]

The rows, in outputs/bench/tag_index/, have 30 tags each of 100,000, as frequent as in nature. Theirs is the obvious
way: the lists of texts of the collection's table, by a dictionary; Python's csv. A turn opens, and reads the lengths of
all rows and the tags of 1,000. The setting names the memory that this adds to a fresh process, at its peak.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from bench.measure import OUT, Comparison, run_bench
from data.collection import Collection
from data.table import SCHEMA
from data.tags.index import TagIndex, index_tags
from data.tags.rules import TagRules
from utils.config.entry_point import ROOT
from utils.vocabulary import FILE, RATINGS, Vocabulary, read_vocabulary, write_vocabulary

CHUNK, TAGS_PER_ROW, ROWS_READ = 131_072, 30, 1000
MEMORY = """
import sys
from pathlib import Path
import numpy as np
from data.tags.index import TagIndex
kib = lambda name: int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])
before = kib("VmRSS")
index = TagIndex(Path(sys.argv[1]))
lengths = np.diff(index.offsets)
found = [index.of_row(row).sum() for row in np.linspace(0, len(lengths) - 1, 1000).astype(int)]
print((kib("VmHWM") - before) / 1024)
"""


def make_vocabulary(count):
    """Return a vocabulary of the ratings and made names."""
    names = (*RATINGS, *(f"made_tag_{number}" for number in range(count)))
    return Vocabulary(names, (9,) * 4 + (0,) * count, (1,) * (count + 4), tuple(range(count + 4)))


def make_rows(folder, rows, vocabulary):
    """Write a collection's index of made rows, and return the collection."""
    arrow, draw = folder / f"{rows}.arrow", np.random.default_rng(0)
    names, ratings = pa.array(vocabulary.names[4:]), pa.array(["g", "sensitive", "q", "e"])
    folder.mkdir(parents=True, exist_ok=True)
    if not arrow.exists():
        with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for start in range(0, rows, CHUNK):
                count = min(CHUNK, rows - start)
                ids = (len(names) ** draw.random(count * TAGS_PER_ROW)).astype(np.int64) - 1
                offsets = pa.array(np.arange(count + 1) * TAGS_PER_ROW, pa.int32())
                columns = {
                    "path": pa.array(range(start, start + count)).cast(pa.string()),
                    "split": pa.array(["train"] * count),
                    "tags": pa.ListArray.from_arrays(offsets, names.take(pa.array(ids))),
                    "rating": ratings.take(pa.array(draw.integers(0, 4, count))),
                    "weight": pa.array(np.ones(count, np.float32)),
                }
                arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    return Collection(folder, arrow, f"made{rows}", rows)


def read_rows(index):
    """Read all offsets and the outputs of some rows."""
    lengths = np.diff(index.offsets)
    assert lengths.min() > 0
    return [index.of_row(row).sum() for row in np.linspace(0, len(lengths) - 1, ROWS_READ).astype(int)]


def read_lists(collection, columns):
    """Do the same from the lists of texts."""
    collection = Collection(collection.root, collection.arrow, collection.fingerprint, len(collection))
    tags = collection.table["tags"]
    assert min(chunk.value_lengths().to_numpy().min() for chunk in tags.chunks) > 0
    rows = np.linspace(0, len(collection) - 1, ROWS_READ).astype(int)
    return [sum(columns[0, name] for name in dict.fromkeys(tags[int(row)].as_py())) for row in rows]


def read_by_csv(path):
    """Read a vocabulary with Python's csv."""
    with open(path, encoding="utf-8", newline="") as stream:
        return [(row["name"], int(row["category"]), int(row["count"])) for row in csv.DictReader(stream)]


def comparisons(device, quick):
    """Yield the two openings."""
    folder, rows, tags = OUT / "tag_index", 50_000 if quick else 5_000_000, 1000 if quick else 100_000
    vocabulary, started = make_vocabulary(tags), time.perf_counter()
    collection = make_rows(folder, rows, vocabulary)
    index = index_tags(collection, vocabulary, TagRules(None, {}, {}, ""), folder / "cache").folder
    seconds = round(time.perf_counter() - started, 1)
    command = [sys.executable, "-c", MEMORY, str(index)]
    mib = round(float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    yield Comparison(
        f"{rows:,} rows, {mib} MiB more",
        {"index": lambda: read_rows(TagIndex(index)), "lists": lambda: read_lists(collection, vocabulary.columns)},
        facts={"mib": mib, "made_and_indexed_seconds": seconds},
    )
    path = folder / f"{tags}_{FILE}"
    write_vocabulary(path, vocabulary)
    yield Comparison(
        f"{tags:,} tags", {"read_vocabulary": lambda: read_vocabulary(path, "key"), "csv": lambda: read_by_csv(path)}
    )


if __name__ == "__main__":
    run_bench(comparisons)
