"""README.md of an export: front matter for the hub, and facts about the weights and their run (card.md.jinja)."""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from engine.exports.config import Format
from engine.exports.opened_task import OpenedTask
from engine.run.results import read_results
from models.interop import snippets
from models.interop.metadata import LICENCES, base_model, dict_of, label_names, licence_of
from models.outputs import OUTPUTS
from utils.errors import UserError
from utils.formats.thresholds import PER_TAG, ThresholdTable
from utils.io.files import Json, Values, read_json, write_json
from utils.io.safe_text import code_span, hide_secrets, hide_secrets_in, safe_lines
from utils.record.figures import COUNTS, show_duration, show_figure, show_rows
from utils.record.report import write_table

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name
_TEMPLATE = Path(__file__).with_suffix(".md.jinja")
# Of a run; none shows photographs alone.
_PICTURES = ("curves", "samples", "evaluate_samples", "reconstructions", "worst", "confusion", "pr_curves")
_FOLDERS = re.compile(r"^(?!experiment=|[\w.+~@]*=?\w+:)([\w.+~@]*=)?.*/")  # of a local path in an override
_PIPELINES = {"diffusion": "text-to-image", "autoencoder": "image-to-image"}  # of tasks without outputs
Results = Mapping[str, Mapping[str, float]]  # of `read_results`


@dataclass(frozen=True)
class Card:
    """The contents of README.md.

    name: the name of the format; form: its row. file: the exported file. run_dir: the folder with results of
    evaluate.py; null: the run of the weights. about: facts from the user, by name.
    """

    weights: OpenedTask
    name: str
    form: Format
    file: str
    run_dir: str | None = None
    thresholds: ThresholdTable | None = None
    about: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def metadata(self) -> Values:
        """The weights' metadata."""
        return self.weights.metadata

    def write(self, folder: Path, more: str = "") -> None:
        """Write README.md, and curves and pictures of the run. more: Markdown to append."""
        run = self.weights.run
        place = Path(self.run_dir or getattr(run, "path", ""))
        results = read_results(place, self.metadata.get("weights_hash"))
        if not results and run and run.objective is not None and self.weights.path.stem == "best_weights":
            images = dict_of(self.metadata, "trained_on").get("validation_images")
            results[f"validation: {images} images"] = run.result.get("figures", {})
        pictures = [name for name in _PICTURES if results and (place / f"plots/{name}.png").is_file()]
        for name in pictures:
            shutil.copy(place / f"plots/{name}.png", folder)
        rows = [asdict(row) for row in (self.thresholds.rows if self.thresholds else ()) if row.profile != PER_TAG]
        known = {name: dict_of(self.metadata, name) for name in ("trained_on", "origin")}
        known |= {"names": label_names(self.metadata), "licence": licence_of(self.metadata), "run": run}
        write_table(folder / "thresholds.csv", rows)
        measured = {"results": results, "pictures": pictures, "thresholds": show_rows(rows) if rows else ""}
        texts = {"program": self._program(), "prompts": self._prompts(), "more": safe_lines(more).strip()}
        functions = {"code": code_span, "show_command": _show_command}
        functions |= {"show_figure": show_figure, "show_duration": show_duration}
        facts = {"card": self, "metadata": self.metadata, **known, **measured, **texts, **functions}
        card = ModelCard.from_template(self._front_matter(results), _TEMPLATE, **facts)
        card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
        card.save(folder / "README.md")

    def _program(self) -> str | None:
        """Return a program that uses the weights, as Markdown; for our own format, a command."""
        metadata, form, file = self.metadata, self.form, self.file
        if form.use is not None:
            return resolve_name(form.use)(form, metadata, file)
        if form.template is None:
            return form.load or f"    python predict.py weights={file} input=image.png output=predictions.jsonl"
        return f"```python\n{snippets.image_program(form.template, metadata, file).rstrip()}\n```"

    def _prompts(self) -> list[str]:
        """Return the prompts of the pictures that a task draws in training."""
        prompts = dict_of(dict_of(self.metadata, "task"), "samples").get("prompts") or ()
        return [str(prompt["text"] if isinstance(prompt, dict) else prompt) for prompt in prompts]

    def _front_matter(self, results: Results) -> ModelCardData:
        """Return the facts that the hub reads: licence, base model, library, task, tags, prompts and figures."""
        licence = licence_of(self.metadata)
        is_known = licence is None or LICENCES.fullmatch(licence)
        base = base_model(self.metadata)
        name = dict_of(self.metadata, "task").get("name")
        output = self.metadata["output"]
        pipeline = OUTPUTS[output].pipeline if output else _PIPELINES.get(name)
        relation = "adapter" if self.form.is_adapter else "finetune"
        front = {
            "license": licence if is_known else "other",
            "license_name": None if is_known else licence,
            "base_model": base,
            "base_model_relation": base and relation,
            "library_name": self.form.library,
            "pipeline_tag": pipeline,
        }
        front["tags"] = ["atelier", *([str(name)] if name else [])]
        front["widget"] = [{"text": prompt} for prompt in self._prompts()] or None
        if results and pipeline:
            front["model_name"] = self.weights.title
        return ModelCardData(**hide_secrets_in(front), eval_results=_list_results(results, pipeline))


def _list_results(results: Results, pipeline: str | None) -> list[EvalResult] | None:
    """Return the figures of evaluations for the hub; None without figures, or without a task of the hub."""
    measured = []
    for title, figures in results.items() if pipeline else ():
        split, _, images = hide_secrets(title).partition(": ")
        result = partial(EvalResult, pipeline, "images", images, dataset_split=split)
        measured += [
            result(metric_type=name, metric_value=value) for name, value in figures.items() if name not in COUNTS
        ]
    return measured or None


def _show_command(words: Sequence[str]) -> str:
    """Return the command of a run, with the last part of each local path alone."""
    return shlex.join([_FOLDERS.sub(r"\1", word) for word in words if not word.startswith("run_dir=")])


def add_report(folder: Path, report: Json) -> None:
    """Write the report of `report["file"]` into export.json, and keep the reports of other files."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
