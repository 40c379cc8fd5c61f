"""The formats of export.py: what each writes, and the table of all.

A format is a function of (weights, folder, config) that returns a report. It writes into an empty folder and compares
the files with PyTorch. Only then are they moved to their place. Libraries are imported where they are used.
"""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from engine.exports.card import Card
from engine.exports.format import Format
from engine.exports.weights import Weights, WeightsChoice
from engine.judging.quantised import quantise
from models.interop import libraries, page, tag_forms
from models.interop.metadata import dict_of
from models.interop.onnx_file import export_onnx
from models.interop.parity import refuse_difference
from sdxl.files import checkpoints
from sdxl.files.facts import modelspec_facts
from sdxl.files.family import PARTS
from sdxl.files.names import part_state
from sdxl.files.tokenizer import build_tokenizer
from sdxl.lora import lora
from sdxl.lora.files import adapter_state
from sdxl.networks import Networks, describe, load_networks, load_vae, open_networks
from sdxl.step import decode_to_levels
from sdxl.vae import unlike_sdxls
from utils.config.bounds import Positive, Width
from utils.config.schema import PathList, PathText, Strict
from utils.errors import UserError, about
from utils.formats.preprocessing import Preprocessing
from utils.formats.thresholds import PER_TAG, ThresholdTable, find_thresholds
from utils.formats.vocabulary import vocabulary_of
from utils.io.files import Json, readable
from utils.io.weights import write_weights
from utils.record.logging import get_logger

log = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_SCRATCH = ".export-"
Entry = Json  # of export.json

# ------------------------------------------------------------------------------------------------ networks for images


def write_onnx(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write an ONNX file. One in int8 is made from one in float32, which is compared with PyTorch."""
    precision = config.precision
    path = folder / ("model.onnx" if precision == "fp32" else f"model_{precision}.onnx")
    difference = export_onnx(weights.model, weights.metadata, path, precision, config.accepted)
    report = {"file": path.name, "onnx_max_abs_diff": difference}
    if precision == "int8":
        report["measured"] = quantise(config, path)
    return report


def write_page(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write an HTML file that runs the network in a browser."""
    with TemporaryDirectory() as scratch:
        report = write_onnx(weights, Path(scratch), config)
        page.write_page(folder / "page.html", Path(scratch, report.pop("file")), weights.title)
    return report


def write_timm(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write a folder of timm. A tagger has the outputs and selected_tags.csv of wd14.

    timm's taggers take BGR, like the published ones. Mean and standard deviation keep the order red, green, blue:
    neggles/wdv3-timm normalises, then reverses the channels. Every other network takes RGB.
    """
    network = weights.model.network
    metadata = weights.metadata
    report = {}
    if weights.model.output.has_tags:
        vocabulary = vocabulary_of(metadata)
        preprocessing = {**metadata["preprocessing"], "pad": "none"}  # programs pad before they call timm
        kept, rows = tag_forms.to_wd_order(vocabulary)
        network = tag_forms.to_bgr(tag_forms.reorder_head(network, rows), preprocessing["image_size_hw"])
        metadata = {**metadata, **kept.facts(), "preprocessing": preprocessing}
        tag_forms.write_tags(folder, kept, _thresholds(weights, config))
        report = tag_forms.describe_changes(vocabulary, kept)
    report["max_abs_diff"] = libraries.write_compared(libraries.TIMM, network, metadata, folder, config.accepted)
    return report


def write_transformers(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write a folder of transformers."""
    difference = libraries.write_compared(
        libraries.TRANSFORMERS, weights.model.network, weights.metadata, folder, config.accepted
    )
    return {"max_abs_diff": difference}


def write_safetensors(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write a weight file of Atelier: the tensors, and the metadata needed to rebuild the network."""
    write_weights(folder / "model.safetensors", weights.whole.state_dict(), weights.metadata)
    return {}


def write_wd14(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write an ONNX file in the WD form (models/interop/tag_forms.py), and the form's other files."""
    vocabulary = vocabulary_of(weights.metadata)
    stated = Preprocessing.model_validate(weights.metadata["preprocessing"])
    tag_forms.check_images(stated)
    thresholds = _thresholds(weights, config)
    kept, rows = tag_forms.to_wd_order(vocabulary)
    graph = tag_forms.make_graph(weights.model, rows, stated.image_size_hw)
    metadata = {**weights.metadata, **kept.facts(), "form": tag_forms.WD_FORM.model_dump()}
    if thresholds is not None:
        metadata["thresholds"] = thresholds.of_tags(kept, PER_TAG)
    path = folder / FORMATS["wd14"].file
    difference = export_onnx(graph, metadata, path, config.precision, config.accepted)
    tag_forms.write_tags(folder, kept, thresholds)
    tag_forms.write_head(folder, graph.network)
    return {"onnx_max_abs_diff": difference, **tag_forms.describe_changes(vocabulary, kept)}


def write_repository(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write one folder for all programs: the files of timm and of wd14, which share selected_tags.csv."""
    return {**write_timm(weights, folder, config), **write_wd14(weights, folder, config)}


def _thresholds(weights: Weights, config: "ExportConfig") -> ThresholdTable | None:
    return find_thresholds(config.thresholds, weights.path, weights.metadata.get("weights_hash"))


# --------------------------------------------------------------------------------------------------------------- SDXL


def write_kohya(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write only the LoRA, read it again, and compare its tensors."""
    if weights.setup.task.lora is None:
        raise UserError(f"format: {config.format} is for a LoRA, but this run trained the U-Net; set single_file")
    if values := unlike_sdxls(weights.setup.model.vae_values):
        log.warning("format: the LoRA learnt latents of a VAE with %s, unlike SDXL's; use it with this VAE", values)
    path = folder / FORMATS["kohya"].file
    changes = weights.task.adapter.changes()
    lora.write_kohya(path, changes, DTYPES[config.precision], modelspec_facts(weights, _given(weights, config)))
    with torch.device("meta"):
        shapes = open_networks(weights.setup.model, lora.ADAPTED)
    read = adapter_state(path, shapes)
    wanted = weights.task.adapter.state_dict()
    # float16 rounds tensors of smaller numbers coarsely.
    difference = max(
        float((read[name] - tensor.cpu()).abs().max() / tensor.abs().max().clamp_min(1e-3))
        for name, tensor in wanted.items()
    )
    refuse_difference(difference, config.accepted, path.name)
    return {"max_abs_diff": difference}


def _given(weights: Weights, config: "ExportConfig") -> dict[str, str | None]:
    """Return the user's facts. Without `trigger`, it is that of the run."""
    return {
        "author": config.author,
        "description": config.description,
        "trigger": config.trigger or dict_of(weights.metadata, "trained_on").get("trigger"),
    }


def whole_networks(weights: Weights) -> Networks:
    """Return all of a run's networks, with its LoRA merged. Raises UserError if the base model is not the run's."""
    task = weights.task
    networks = open_networks(weights.setup.model, [part for part in PARTS if part not in task.exported])
    task.take(networks)
    weights.check_helpers()
    if weights.setup.task.lora is None:
        return networks | {name: task.get_submodule(name) for name in task.exported}
    task.adapter.merge(networks)
    return networks


def write_diffusers(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write the whole model as a folder of diffusers."""
    write = partial(
        checkpoints.write_diffusers,
        tokenizer=build_tokenizer(),
        zeros_for_empty_prompt=weights.setup.task.captions.dropout_to == "zeros",
    )
    return _write_whole(write, weights, folder, config)


def write_single_file(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write the whole model as a single file."""
    write = partial(checkpoints.write_single_file, facts=modelspec_facts(weights, _given(weights, config)))
    return _write_whole(write, weights, folder / FORMATS["single_file"].file, config)


def _write_whole(write: Any, weights: Weights, path: Path, config: "ExportConfig") -> Entry:
    """Write a file or folder, read it again, and compare its tensors, its noise schedule and what its VAE decodes.

    Raises UserError (`output`, `tolerance`) if something differs.
    """
    networks = whole_networks(weights)
    if padding := networks["vae"].config.get("padding_mode"):
        log.warning("format: other programs ignore padding_mode=%s of the VAE: pictures differ at borders", padding)
    dtype = DTYPES[config.precision]
    noise = weights.setup.task.stated_noise
    write(path, networks, dtype=dtype, **noise)
    said = describe(path)
    read = load_networks(path)
    wrong = [name for name, value in noise.items() if (said[name] or False) != value]
    for part, state in checkpoints.cast_states(networks, dtype, folds=path.is_file()).items():
        found = part_state(part, read[part])
        wrong += [f"{part}.{name}" for name, one in state.items() if not torch.equal(found[name], one.float())]
    if wrong:
        raise UserError(f"output: {len(wrong)} values were not written as they are, such as {wrong[0]}; check the disk")
    return _compare_vae(networks["vae"], read["vae"], config)


def _compare_vae(vae: nn.Module, read: nn.Module, config: "ExportConfig") -> Entry:
    """Compare what both VAEs decode, each with its own values. Raises UserError (`tolerance`)."""
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (decode_to_levels(network.float(), latents) for network in (vae, read))
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    refuse_difference(difference, config.accepted, "the VAE in the file")
    return {"vae_max_abs_diff": difference}


def write_vae(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write a VAE for ComfyUI. It is read back, and its pictures are compared. A frozen encoder is the base model's."""
    path = folder / FORMATS["vae"].file
    vae = weights.task.vae
    checkpoints.write_vae_file(path, vae, DTYPES[config.precision], modelspec_facts(weights, _given(weights, config)))
    return _compare_vae(vae, load_vae(path), config)


def write_vae_diffusers(weights: Weights, folder: Path, config: "ExportConfig") -> Entry:
    """Write a VAE for diffusers."""
    vae = weights.task.vae
    checkpoints.write_vae_folder(folder, vae, DTYPES[config.precision])
    return _compare_vae(vae, load_vae(folder), config)


# ---------------------------------------------------------------------------------------------------------- the table

_FILE = 'from_single_file("$file", config=$base)'
_VAE_FILE = 'from_single_file("$file", config=$base, subfolder="vae")'
_FOLDER = 'from_pretrained(".")'
_ON_BASE = 'from_pretrained($base)\npipeline.load_lora_weights(".", weight_name="$file")'
_OPEN = "Open page.html in a browser. It needs neither a server nor the network, and sends nothing."
_tagger = partial(Format, of=("tags",), template="wd14", fp16=True)
_sdxl = partial(Format, of=("diffusion",), library="diffusers", template="sdxl", fp16=True)
_vae = partial(Format, of=("autoencoder",), library="diffusers", template="vae", fp16=True)

FORMATS = {
    "onnx": Format("model.onnx", write_onnx, template="onnx", fp16=True, int8=True),
    "timm": Format("model.safetensors", write_timm, library="timm", template="timm"),
    "transformers": Format("model.safetensors", write_transformers, library="transformers", template="transformers"),
    "safetensors": Format("model.safetensors", write_safetensors),
    "page": Format("page.html", write_page, of=("classes", "tags"), int8=True, load=_OPEN),
    "wd14": _tagger("model.onnx", write_wd14),
    "wd_repository": _tagger("model.onnx", write_repository, library="timm"),
    "kohya": _sdxl("lora.safetensors", write_kohya, load=_ON_BASE, is_adapter=True),
    "single_file": _sdxl("model.safetensors", write_single_file, load=_FILE),
    "diffusers": _sdxl("model_index.json", write_diffusers, load=_FOLDER),
    "vae": _vae("vae.safetensors", write_vae, load=_VAE_FILE),
    "vae_diffusers": _vae("config.json", write_vae_diffusers, load=_FOLDER),
}


class HubConfig(Strict):
    """An upload to the hub; name: OWNER/NAME."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None
    private: bool
    dry_run: bool


class ExportConfig(WeightsChoice):
    """conf/export.yaml, checked."""

    format: Literal[tuple(FORMATS)]
    output: PathText | None
    precision: Literal["fp32", "fp16", "int8"]
    tolerance: Positive | None
    thresholds: PathText | None
    license: str | None
    author: str | None
    description: str | None
    trigger: str | None
    card: PathText | None
    lora: PathList
    rank: Width | None
    hub: HubConfig
    dry_run: bool

    @property
    def accepted(self) -> float:
        """Return the largest accepted difference. Measured, with random and varied weights: at most 1e-6 and 2e-3."""
        return self.tolerance or {"fp16": 2e-2}.get(self.precision, 1e-3)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.output is None and (self.run_dir is None or self.lora or self.rank):
            raise ValueError("output: must be given without a run_dir, and with lora or rank; add output=FOLDER")
        if not getattr(FORMATS[self.format], self.precision, True):
            raise ValueError(f"precision: format={self.format} ignores it; remove precision, or set format=onnx")
        return self


def find_format(name: str, weights: Weights) -> Format:
    """Return the row of a format. Raises UserError (`format`) if the weights do not support it."""
    fitting = [other for other, row in FORMATS.items() if weights.subject in row.of]
    if name not in fitting:
        raise UserError(f"format: {name} is no format of {weights.path}; it supports {', '.join(fitting) or 'none'}")
    return FORMATS[name]


def write_export(weights: Weights, folder: Path, config: ExportConfig) -> Entry:
    """Write the files of `config.format` into a folder, and return the report.

    Raises UserError (`format`, `tolerance`, `output`). In that case nothing is written and older files stay.
    """
    row = find_format(config.format, weights)
    thresholds = _thresholds(weights, config)
    if thresholds is not None and weights.subject in ("tags", "classes"):
        if weights.subject == "tags":
            least = thresholds.of_tags(vocabulary_of(weights.metadata), PER_TAG)
        else:
            least = [thresholds.rows[0].threshold] * len(weights.metadata["class_names"])
        weights = replace(weights, metadata={**weights.metadata, "thresholds": least})
    more = ""
    if config.card is not None:
        with about("card"), readable(Path(config.card), "Markdown"):
            more = Path(config.card).read_text(encoding="utf-8")
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    for leftover in folder.glob(f"{_SCRATCH}*"):  # of a killed export
        shutil.rmtree(leftover)
    with TemporaryDirectory(dir=parent, prefix=_SCRATCH) as scratch:
        report = {"file": row.file, **row.write(weights, Path(scratch), config)}
        facts = _given(weights, config) | {"measured": report.get("measured")}
        card = Card(weights, config.format, row, report["file"], config.run_dir, thresholds, facts)
        card.write(Path(scratch), more)
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        report["files"] = [path.relative_to(scratch).as_posix() for path in paths]
        for path in paths:
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return report
