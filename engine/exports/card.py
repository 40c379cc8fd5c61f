"""README.md of an export: front matter for the hub, and what is known of the weights and their run.

An unknown fact has no line. Texts may be a stranger's: they are shown as code.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from engine.exports.format import Format
from engine.exports.results import read_results
from engine.exports.weights import Weights
from models.interop import snippets
from models.interop.metadata import LICENCES, base_model, dict_of, label_names, licence_of
from models.outputs import OUTPUTS
from sdxl.lora.changes import READERS
from utils.errors import UserError
from utils.formats.thresholds import PER_TAG, ThresholdTable
from utils.io.files import Json, Values, read_json, write_json
from utils.io.safe_text import code_span, hide_secrets_in, safe_lines
from utils.record.figures import COUNTS, show_figure, show_rows

REPORT = "export.json"  # one entry for each file that was exported into a folder, under the file's name
_SAMPLES = "plots/evaluate_samples.png"  # of a run
_SHOWN_NAMES = 100  # classes or tags in a card
_LIMITS = {
    "classes": "It always answers with one of its classes, also for an image of none of them.",
    "tags": "It knows no other tags, and a tag that it does not give may still fit the image.",
    "features": "Its outputs are features for further training or search; they name nothing.",
    None: "Its pictures show what its training images and the base model show, with their faults.",
}
_WHAT_CHOSE = (
    "Validation images chose the best weights of the run; test images were used for nothing but these figures."
)
Results = Mapping[str, Mapping[str, float]]  # of `read_results`


@dataclass(frozen=True)
class Card:
    """What README.md is made of.

    name: of the format, whose row is `form`. file: the exported file. run_dir: the folder with figures of evaluate.py;
    null: the run of the weights. about: facts that the user gives, by name.
    """

    weights: Weights
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
        """Write README.md, and for SDXL a picture of samples. more: Markdown to append."""
        place = Path(self.run_dir or getattr(self.weights.run, "path", ""))
        results = read_results(place, self.metadata.get("weights_hash"))
        lines = [*self._introduce(), *self._describe_training(), *_show_results(results, self.thresholds)]
        lines += [f"- {code_span(prompt)}" for prompt in self._prompts()]
        if results and (place / _SAMPLES).is_file():
            shutil.copy(place / _SAMPLES, folder / "samples.png")
            lines += ["", "![samples](samples.png)"]
        lines += ["", *self._state_limits()]
        front = yaml.safe_dump(hide_secrets_in(self._front_matter(results)), sort_keys=False, width=10**6)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip()
        text = f"---\n{front}---\n\n{text}\n"
        if more:
            text += f"\n{safe_lines(more).strip()}\n"
        (folder / "README.md").write_text(text, encoding="utf-8")

    def _introduce(self) -> list[str]:
        """Return title, names, preprocessing and program."""
        lines = [f"# {code_span(self.weights.title)}, format {self.name}", "", *_list(self.about)]
        if names := label_names(self.metadata):
            more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
            shown = ", ".join(map(code_span, names[:_SHOWN_NAMES]))
            lines += [f"{len(names):,} {self.metadata['output']}: {shown}{more}.", ""]
        if "preprocessing" in self.metadata:
            lines += ["Preprocessing of the images in training:", "", *_list(self.metadata["preprocessing"])]
        if program := self._program():
            lines += ["## Use", "", program, ""]
        return lines

    def _program(self) -> str | None:
        """Return the program as Markdown, or who reads a LoRA that diffusers does not. Our own format has a command."""
        metadata, form, file = self.metadata, self.form, self.file
        if form.template is None:
            return form.load or f"    python predict.py weights={file} input=image.png output=predictions.jsonl"
        if form.load:
            task = metadata["task"]
            if form.is_adapter and task["lora"]["kind"] != "lora":
                return f"Read by {READERS[task['lora']['kind']]}."
            text = snippets.sdxl_program(form.template, form.load, task, file, base_model(metadata))
        else:
            text = snippets.image_program(form.template, metadata, file)
        return f"```python\n{text.rstrip()}\n```"

    def _describe_training(self) -> list[str]:
        trained_on = dict_of(self.metadata, "trained_on").items()
        known = {name.replace("_", " "): value for name, value in trained_on if isinstance(value, int | str)}
        known |= {"step of these weights": self.metadata.get("step"), "precision": self.metadata.get("precision")}
        return ["## Training", "", *_list(known)]

    def _prompts(self) -> list[str]:
        """Return the texts that a task of pictures generates in training."""
        prompts = dict_of(dict_of(self.metadata, "task"), "samples").get("prompts") or ()
        return [str(prompt["text"] if isinstance(prompt, dict) else prompt) for prompt in prompts]

    def _state_limits(self) -> list[str]:
        """Return limits and licence."""
        hold = "- The figures and examples hold for images like those it was trained on; measure it on yours."
        lines = ["## Limits", "", f"- {_LIMITS[self.metadata['output']]}", hold, "", "## Licence", ""]
        licence = licence_of(self.metadata)
        origin = dict_of(self.metadata, "origin")
        if "source" in origin:
            source = str(origin["source"])
            source = source if source.startswith("hf:") else Path(source).name  # no folder of a disk
            lines.append(f"Trained from {code_span(source)} (layout {code_span(origin.get('layout'))}).")
        if licence is None:
            return [*lines, "Training began with random weights: no other licence applies, and these are your own."]
        lines.append(f"Licence of the source weights: {code_span(licence)}.")
        if "cc-by-nc" in licence.lower():
            lines.append("It forbids commercial use, also of these weights.")
        return lines

    def _front_matter(self, results: Results) -> Json:
        """Return what the hub reads of a card: licence, base model, library, task, tags, prompts and figures."""
        front = {}
        if (licence := licence_of(self.metadata)) is not None:
            is_known = LICENCES.fullmatch(licence)
            front = {"license": licence} if is_known else {"license": "other", "license_name": licence}
        if (base := base_model(self.metadata)) is not None:
            relation = "adapter" if self.form.is_adapter else "finetune"
            front |= {"base_model": base, "base_model_relation": relation}
        if self.form.library is not None:
            front["library_name"] = self.form.library
        name = dict_of(self.metadata, "task").get("name")
        output = self.metadata["output"]
        if output or name == "diffusion":
            front["pipeline_tag"] = OUTPUTS[output].pipeline if output else "text-to-image"
        front["tags"] = ["atelier", *([str(name)] if name else [])]
        if prompts := self._prompts():
            front["widget"] = [{"text": prompt} for prompt in prompts]
        entries = []
        for title, figures in results.items() if "pipeline_tag" in front else ():
            metrics = [{"type": name, "value": value} for name, value in figures.items() if name not in COUNTS]
            split, _, images = title.partition(": ")
            entries.append(
                {
                    "task": {"type": front["pipeline_tag"]},
                    "dataset": {"type": "images", "name": images, "split": split},
                    "metrics": metrics,
                }
            )
            front["model-index"] = [{"name": self.weights.title, "results": entries}]
        return front


def _show_results(results: Results, thresholds: ThresholdTable | None) -> list[str]:
    lines = ["## Results", "", _WHAT_CHOSE, ""] if results else []
    for title, figures in results.items():
        lines += [f"Measured on {code_span(title)}:", ""]
        lines += [*(f"- {name}: {show_figure(name, figures)}" for name in figures), ""]
    if rows := [asdict(row) for row in (thresholds.rows if thresholds else ()) if row.profile != PER_TAG]:
        fitted = (
            "Thresholds (of tags, fitted to one half of the images of their calibration and measured on the other):"
        )
        lines += [fitted, "", "```", show_rows(rows), "```", ""]
    return lines


def _list(facts: Values) -> list[str]:
    return [*(f"- {name}: {code_span(value)}" for name, value in facts.items() if value is not None), ""]


def add_report(folder: Path, report: Json) -> None:
    """Write the report of `report["file"]` into export.json, and keep the reports of other files."""
    path = folder / REPORT
    try:
        earlier = dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder") from None
    write_json(path, {**earlier, report["file"]: report})
