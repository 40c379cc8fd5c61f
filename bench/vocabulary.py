"""How fast a vocabulary of 100,000 tags opens, beside reading its rows alone, in one run.

python bench/vocabulary.py [quick]
"""

import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import OUT, Comparison, run_bench
from utils.formats.vocabulary import Vocabulary, read_facts, read_vocabulary, write_vocabulary

TAGS = 100_000


def compare(count, has_facts):
    """Return the comparison, of a file or of the metadata of weights; both are checked, row by row."""
    file = OUT / "selected_tags.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_vocabulary(file, Vocabulary.of((0, f"tag_{number}") for number in range(count)))
    facts = read_vocabulary(file).facts()

    def read_rows():
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream))

    opened = (lambda: read_facts(file, facts)) if has_facts else (lambda: read_vocabulary(file))
    return Comparison({"vocabulary": opened, "csv.DictReader": read_rows}, clock=time.process_time)


def settings(device, quick):
    """Yield the two settings."""
    count = 1_000 if quick else TAGS
    yield f"{count:,} tags, selected_tags.csv", lambda: compare(count, False)
    yield f"{count:,} tags, weight file", lambda: compare(count, True)


if __name__ == "__main__":
    run_bench(settings)
