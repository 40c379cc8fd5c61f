"""How fast the page of view.py has a million rows before it, over the same work by hand, on made data.

python bench/view.py [quick]            (on an idle machine; a million rows take 0.8 GB in outputs/bench/view)
"""

import io
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from bench.measure import OUT, Comparison, run_bench
from data.collection.collection import Collection, index_collection
from data.collection.search import Search
from data.images.open import DEFAULT_MAX_PIXELS
from utils.record.curves import Curves, thin
from viewer.images import reduce_image

TAGS, TILE_PX = 20, 256


def write_metrics(path, rows):
    """Write rows of a training run."""
    row = {"step": 0, "kind": "train", "time": 1.5e9, "epoch": 0.25, "loss": 2.25, "lr": 1e-3, "images_per_sec": 900.5}
    path.write_text("".join(json.dumps(row | {"step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(rows)))


def write_manifest(folder, rows):
    """Write a manifest of packed images with 20 of 5,000 tags each; the shard is empty."""
    draw, numbers = np.random.default_rng(0), np.arange(rows)
    names = pa.array([f"tag_{number}" for number in range(5_000)])
    ids = pa.array(np.minimum(draw.exponential(300, TAGS * rows), 4_999).astype(np.int32))
    tags = pa.DictionaryArray.from_arrays(ids, names).cast(pa.string())
    (folder / "shard.tar").touch()
    columns = {
        "path": [f"images/{number % 1000:03}/{number:07}.jpg" for number in range(rows)],
        "label": [f"class_{number % 1000}" for number in range(rows)],
        "split": np.where(numbers % 20 == 0, "val", "train"),
        "caption": [f"image {number} of a red house" for number in range(rows)],
        "tags": pa.ListArray.from_arrays(pa.array(np.arange(0, TAGS * rows + 1, TAGS, dtype=np.int32)), tags),
        "width": draw.integers(200, 4000, rows), "height": draw.integers(200, 4000, rows),
        "shard": ["shard.tar"] * rows, "offset": 0 * numbers, "length": 0 * numbers,
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "manifest.parquet")


def find_by_hand(table):
    """Return the rows with a tag and a width."""
    owners = pc.list_parent_indices(table["tags"]).filter(pc.equal(pc.list_flatten(table["tags"]), "tag_70"))
    return np.intersect1d(owners.to_numpy(), np.flatnonzero(table["width"].to_numpy() >= 1000))


def draw_photo(rng):
    """Return the bytes of a JPEG of 500 x 375 pixels with some detail."""
    small = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    small.resize((500, 375)).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def reduce_by_hand(content):
    """Return a thumbnail as a JPEG."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture.thumbnail((TILE_PX, TILE_PX))
    picture.save(file := io.BytesIO(), "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def comparisons(device, quick):
    """Yield the comparisons; those of a first opening empty the cache before each turn."""
    rows, folder = 1_000 if quick else 1_000_000, OUT / "view"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "many").mkdir(parents=True)
    metrics, manifest, cache = folder / "metrics.jsonl", folder / "many/manifest.parquet", folder / "cache"
    write_metrics(metrics, rows)
    write_manifest(folder / "many", rows)
    time.sleep(2.5)  # a file that was written just now counts as changed

    def curves():
        read = Curves(metrics)
        read.read()
        return thin(*read.series("train", "loss"), 2_000)

    def open_again():
        root = str(folder / "many")
        return Search(Collection(root, index_collection(root, validation_fraction=0.0, cache=cache)))

    def open_first():
        shutil.rmtree(cache, ignore_errors=True)
        return open_again()

    by_hand, how = lambda: [json.loads(line) for line in metrics.open()], lambda: pq.read_table(manifest)
    yield Comparison(f"metrics.jsonl of {rows:,} rows", {"Curves": curves, "json.loads": by_hand})
    yield Comparison(f"manifest of {rows:,} images, first", {"index": open_first, "read_table": how})
    yield Comparison(f"manifest of {rows:,} images, again", {"index": open_again, "read_table": how})
    search, table = open_again(), how()
    sides = {"Search.find": lambda: search.find("tag_70 width>=1000"), "pyarrow": lambda: find_by_hand(table)}
    yield Comparison(f"a tag and a width in {rows:,} images", sides)
    rng = np.random.default_rng(0)
    photos = [draw_photo(rng) for _ in range(4 if quick else 100)]
    sides = {
        "page": lambda: [reduce_image(photo, "photo", DEFAULT_MAX_PIXELS, TILE_PX) for photo in photos],
        "Pillow": lambda: [reduce_by_hand(photo) for photo in photos],
    }
    yield Comparison(f"a JPEG of 500 x 375 to {TILE_PX} px", sides, len(photos))
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_bench(comparisons)
