"""What asking for files ahead gains (data/read_ahead.py): the training stream with and without, cached and not.

python bench/cold_read.py [quick]     (on an idle machine; the embedded glyphs, drawn if need be)

Sides run in turns; a turn reads, decodes and augments batches of one shuffled order in the loop's own process
(`runtime.workers=0`). "not cached": all files are dropped from the page cache first, as they are where a collection is
new or larger than the memory, and each turn reads others, since a disk may have a cache of its own. "cached": all turns
read the same files, which shows what the asking costs where it gains nothing. Directories are cached in both.
"""

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import describe_machine, read_group, row_of, take_turns, write
from data.config import AugmentConfig, GlyphsConfig
from data.image_data import load_collection
from data.loader import SampleReader
from data.read_ahead import ReadAhead
from data.source import ImageFiles
from data.stream import RankBatches, ShuffledSampler
from data.transforms import TrainTransform

BATCH, BATCHES, TURNS = 64, 24, 7


def no_fields(example):
    """Add nothing to a sample."""
    return {}


def evict(files):
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_turn(reader, chunks, *, ahead):
    """Return a turn: the next chunk of batches, one after the other."""

    def turn():
        batches = next(chunks)
        for batch in ReadAhead(batches, reader.source.file_of) if ahead else batches:
            for draw in batch:
                reader[draw]

    return turn


def measure(setting, reader, chunks, quick):
    """Return the row of a setting; milliseconds are of one image."""
    sides = {"ahead": make_turn(reader, chunks, ahead=True), "one by one": make_turn(reader, chunks, ahead=False)}
    images = BATCH * (1 if quick else BATCHES)
    found = take_turns(sides, steps=images, warmup=1, turns=2 if quick else TURNS, device=torch.device("cpu"))
    return row_of(setting, found, *sides)


def main():
    quick = sys.argv[1:] == ["quick"]
    collection = load_collection(read_group(GlyphsConfig, "data", "glyphs"))
    transform = TrainTransform(read_group(AugmentConfig, "augment", "glyphs"))
    source = ImageFiles(collection, 1, max_pixels=10**6)
    reader = SampleReader(collection, source, {"images": transform}, no_fields, training=True)
    batches = iter(
        RankBatches(
            ShuffledSampler(collection.rows("train"), seed=0), seed=0, global_batch_size=BATCH, micro_batch_size=BATCH,
            rank=0, world_size=1, start_step=0,
        )
    )  # fmt: skip
    chunks = iter(lambda: list(itertools.islice(batches, 1 if quick else BATCHES)), [])
    evict(map(collection.absolute_path, range(len(collection))))
    rows = [measure("not cached", reader, chunks, quick)]
    rows += [measure("cached", reader, itertools.repeat(next(chunks)), quick)]
    write("cold_read", rows, machine=describe_machine(torch.device("cpu")), quick=quick)


if __name__ == "__main__":
    main()
