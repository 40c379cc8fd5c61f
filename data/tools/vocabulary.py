"""Write the tags of a collection to train on, and spellings to join (prepare.py job=vocabulary)."""

import csv
from io import StringIO
from pathlib import Path

from data.config import DataConfig
from data.load import load_collection
from data.tags.rules import read_rules
from data.tags.spellings import find_variants
from data.tags.vocabulary import append_vocabulary, count_tags, make_vocabulary
from data.tools.config import CollectVocabulary
from utils.errors import about
from utils.formats.vocabulary import read_any_vocabulary, write_vocabulary
from utils.io.files import output_errors, write_text


def collect_vocabulary(job: CollectVocabulary, data: DataConfig) -> str:
    """Write the vocabulary. Raises UserError (`data.root`, `job`)."""
    collection = load_collection(data)
    vocabulary = make_vocabulary(collection, job, "job.")
    if job.append_to is not None:
        with about("job.append_to"):
            vocabulary = append_vocabulary(read_any_vocabulary(Path(job.append_to)), vocabulary)
    variants = find_variants(count_tags(collection, read_rules(job, "job.")))
    output = Path(job.output)
    aliases = output.with_name(f"{output.stem}_aliases.csv")
    with output_errors("job.output", output):
        write_vocabulary(output, vocabulary)
        lines = StringIO()
        csv.writer(lines, lineterminator="\n").writerows(variants.items())
        write_text(aliases, lines.getvalue())
    return f"{len(vocabulary)} tags in {output}; {len(variants)} spellings to join in {aliases} (for task.aliases)"
