"""How fast a vocabulary of 100,000 tags opens from selected_tags.csv, beside its other forms and its rows alone.

python -m bench.vocabulary [quick]
"""

import csv
import json
import time

from bench.measure import OUT, Comparison, run_bench
from utils.formats.vocabulary import Vocabulary, read_any_vocabulary, read_facts, write_vocabulary


def settings(device, quick):
    """Yield the one setting; each form is checked, tag by tag."""
    count = 1_000 if quick else 100_000
    table = OUT / "selected_tags.csv"
    vocabulary = Vocabulary.of((0, f"tag_{number}") for number in range(count))
    write_vocabulary(table, vocabulary)
    text = OUT / "vocabulary.json"
    text.write_text(json.dumps(vocabulary.names))
    sides = {
        "selected_tags.csv": lambda: read_any_vocabulary(table),
        "vocabulary.json": lambda: read_any_vocabulary(text),
        "weight file": lambda: read_facts(table, vocabulary.facts()),
        "csv.DictReader": lambda: [*csv.DictReader(table.open())],
    }
    yield f"{count:,} tags", lambda: Comparison(sides, clock=time.process_time)


if __name__ == "__main__":
    run_bench(settings)
