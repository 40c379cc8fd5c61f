"""Write the tags of a collection to train on (prepare.py job=vocabulary)."""

from pathlib import Path
from typing import Literal

from data.config import DataConfig
from data.open import load_collection
from data.tags.vocabulary import VocabularyConfig, make_vocabulary
from data.tools.tool import Tool
from utils.config.schema import PathText
from utils.formats.vocabulary import write_vocabulary
from utils.io.files import output_errors


class CollectVocabulary(Tool, VocabularyConfig):
    """Collect the tags of `data.root` into the vocabulary file `output`."""

    name: Literal["vocabulary"]
    output: PathText

    def run(self, data: DataConfig) -> str:
        """Write the vocabulary. Raises UserError (`data.root`, `job`)."""
        vocabulary = make_vocabulary(load_collection(data), self, "job.")
        with output_errors("job.output", Path(self.output)):
            write_vocabulary(Path(self.output), vocabulary)
        return f"{len(vocabulary)} tags in {self.output}"
