"""What a run costs beyond its steps, as it grows: checkpoints, the order of samples, the ranks' store, the index.

python bench/scale.py [quick] [rows=10000000] [models=convnextv2_atto,convnextv2_tiny,convnextv2_base]

On an idle machine; the tables of docs/scale.md. A checkpoint has weights, the two moments of AdamW and an average.
It is written (flushed to the disk), checked and read; the middle of three times. The collection is an index of made-up
rows: one of 10 million takes 1.5 GB of disk while it is measured.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import read_group
from data.collection import Collection, open_collection
from data.stream import RankBatches, ShuffledSampler
from data.table import SCHEMA
from engine.checkpoint import find_damage, load_checkpoint, save_checkpoint
from models.build import build_network
from models.config import ModelConfig
from utils.ranks.distributed import World, meet_ranks

TURNS, CLASSES, CHUNK_ROWS = 3, 1000, 1_000_000
STREAM_ROWS, RANKS, GLOBAL_BATCH = 100_000_000, 1024, 8192
DEFAULTS = {"rows": "10000000", "models": "convnextv2_atto,convnextv2_tiny,convnextv2_base"}


def seconds_of(call: Callable[[], object]) -> float:
    """Return the median seconds of a call."""
    found = []
    for _ in range(TURNS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return median(found)


def checkpoint_row(name: str, folder: Path) -> str:
    """Return the line of a network: parameters, what a step sends, and its checkpoint."""
    network = build_network(read_group(ModelConfig, "model", name), CLASSES)
    weights = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    count = sum(parameter.numel() for parameter in network.parameters())
    moments = {
        f"{key}/{moment}": torch.rand_like(tensor) for key, tensor in weights.items() for moment in ("exp_avg", "sq")
    }
    groups = {"weights": weights, "average_weights": weights, "optimizer": moments}
    paths: list[Path] = []
    write = seconds_of(lambda: paths.append(save_checkpoint(folder, 1 + len(paths), groups, {})))
    check = seconds_of(lambda: find_damage(paths[-1]))
    read = seconds_of(lambda: load_checkpoint(paths[-1]))
    size = sum(file.stat().st_size for file in paths[-1].iterdir())
    return (
        f"| {name} | {count / 1e6:.1f} M | {4 * count / 2**20:.0f} MiB | {size / 2**20:.0f} MiB | {write:.2f} s | "
        f"{check:.2f} s | {read:.2f} s |"
    )


def order_row() -> str:
    """Return the line of the order: what a rank of 1,024 needs for its share of a step."""
    sampler = ShuffledSampler(range(STREAM_ROWS), seed=0)
    share = GLOBAL_BATCH // RANKS

    def start() -> None:
        batches = RankBatches(
            sampler, seed=0, global_batch_size=GLOBAL_BATCH, micro_batch_size=share, rank=RANKS - 1, world_size=RANKS,
            start_step=10**6,
        )  # fmt: skip
        next(iter(batches))

    first = seconds_of(start)
    draws = 10_000
    each = seconds_of(lambda: [sampler.at(position) for position in range(draws)]) / draws
    return f"| {STREAM_ROWS:,} | {1e3 * first:.2f} ms | {1e6 * each:.1f} us |"


def meet(ranks: int) -> None:
    """Let ranks meet as under torchrun, each with a connection of its own; all are threads of this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)

    def join(rank: int) -> None:
        own = store if rank == 0 else dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
        meet_ranks(own, World(rank, ranks), timeout_sec=300)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def watch_row(ranks: int) -> str:
    """Return the line of the ranks' store: they meet, and rank 0's watchdog reads a key of each."""
    meeting = seconds_of(lambda: meet(ranks))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for rank in range(ranks):
        store.set(str(rank), "12|3456|step 3456: computing")
    seconds = seconds_of(lambda: [store.get(str(rank)) for rank in range(ranks)])
    return f"| {ranks:,} | {meeting:.2f} s | {1e3 * seconds:.1f} ms |"


def write_index(path: Path, rows: int) -> None:
    """Write an index of made-up rows: a hundredth of them validation, a thousand classes."""
    schema = SCHEMA.with_metadata({b"fingerprint": b"0"})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, rows, CHUNK_ROWS):
            numbers = np.arange(start, min(start + CHUNK_ROWS, rows))
            labels = [f"class_{number % CLASSES:04d}" for number in numbers]
            columns = {
                "path": [f"train/{label}/{number:09d}.jpg" for label, number in zip(labels, numbers)],
                "size": np.full(len(numbers), 100_000), "split": ["val" if n % 100 == 0 else "train" for n in numbers],
                "label": labels, "tags": [()] * len(numbers), "weight": np.ones(len(numbers), np.float32),
            }  # fmt: skip
            arrays = [pa.array(columns.get(field.name, [None] * len(numbers)), field.type) for field in SCHEMA]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def collection_row(rows: int, folder: Path) -> str:
    """Return the line of a collection: what each rank does with its index before the first step."""
    path = folder / "index.arrow"
    write_index(path, rows)
    opened: list[Collection] = []
    start = seconds_of(lambda: opened.append(open_collection(str(folder), path)))
    collection = opened[-1]
    split = seconds_of(lambda: collection.rows("train"))
    names = collection.class_names("train")
    classes = seconds_of(lambda: collection.class_ids(names))
    places = np.random.default_rng(0).integers(0, rows, 1000)
    each = seconds_of(lambda: [collection.row(int(place)) for place in places]) / len(places)
    kept = (collection.rows("train").nbytes + collection.class_ids(names).nbytes) / 2**20
    return (
        f"| {rows:,} | {os.stat(path).st_size / 2**20:,.0f} MiB | {start:.2f} s | {split:.2f} s | {classes:.2f} s | "
        f"{kept:,.0f} MiB | {1e6 * each:.0f} us |"
    )


def main() -> None:
    """Measure and print."""
    words, values = sys.argv[1:], dict(DEFAULTS)
    quick = "quick" in words
    for word in words:
        key, equals, value = word.partition("=")
        if word != "quick" and (not equals or key not in DEFAULTS):
            sys.exit(f"scale: {word!r} is neither quick nor KEY=VALUE with a key of {', '.join(DEFAULTS)}")
        values |= {key: value} if equals else {}
    rows = 10_000 if quick else int(values["rows"])
    models = ["convnextv2_atto"] if quick else values["models"].split(",")
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        say = sys.stdout.write
        say("| network | parameters | gradients of a step | checkpoint | write | check | read |\n|" + "---|" * 7 + "\n")
        for name in models:
            say(checkpoint_row(name, folder / name) + "\n")
        say("\n| rows | the first share of a rank | a position |\n|---|---|---|\n" + order_row() + "\n")
        say("\n| ranks | they meet | a round of the watchdog, every 5 s |\n|---|---|---|\n")
        for ranks in (8, 64, RANKS):
            say(watch_row(ranks) + "\n")
        say("\n| rows | index | open | split | classes | arrays kept | a row |\n|" + "---|" * 7 + "\n")
        for number in sorted({rows // 10, rows}):
            say(collection_row(number, folder) + "\n")


if __name__ == "__main__":
    main()
