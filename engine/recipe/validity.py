"""Questions about the figures of a run that need features of a frozen network, or decoded images.

Questions that files and tables alone answer are in data/validity/. Each answer is kept by the index of the collection
and the configuration that it depends on, so that a second start does not ask again.
"""

from collections.abc import Callable
from contextlib import suppress

from data.collection.collection import Collection
from data.validity.finding import Finding
from engine.config import TrainingConfig
from engine.update.runtime import Runtime
from utils.io.files import Json, ignore_write_errors, read_json, write_json
from utils.io.memo import OURS, files_key, own_cache
from utils.ranks import distributed

Question = Callable[[TrainingConfig, Collection, Runtime], Finding | None]
# A question decides by `config.task.name` and the collection whether it applies.
QUESTIONS: tuple[Question, ...] = ()

_FOLDER = OURS / "findings"
_VERSION = 1  # increment it when a question changes


def list_findings(config: TrainingConfig, collection: Collection, runtime: Runtime) -> list[Json]:
    """Return all findings about a run, the most serious first: the fields of `Finding`. Rank 0 asks for all ranks."""
    asked = distributed.rank_zero_call(lambda: ask(config, collection, runtime))
    return [finding._asdict() for finding in sorted([*collection.findings, *asked], reverse=True)]


def ask(config: TrainingConfig, collection: Collection, runtime: Runtime) -> list[Finding]:
    """Return the findings of the questions, which are asked once."""
    stated = [config.task.model_dump(mode="json"), config.data.model_dump(mode="json"), config.init_from]
    file = own_cache(_FOLDER) / f"{files_key([collection.arrow], _VERSION, len(QUESTIONS), *stated)}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Finding(*values) for values in read_json(file)]
    findings = [finding for question in QUESTIONS if (finding := question(config, collection, runtime)) is not None]
    with ignore_write_errors(file):
        write_json(file, findings)
    return findings
