"""The formats of export.py. Each is a function of (weights, folder, config) that returns a report.

A function writes into an empty folder and compares the files with PyTorch. Only then are they moved to their place.
Libraries are imported where they are used.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from engine.exports.card import read_figures, write_card
from engine.exports.sdxl_facts import modelspec_facts
from engine.exports.weights import MovedBase, Weights
from models.interop import tag_forms
from models.interop.metadata import dict_of
from models.interop.onnx_file import export_onnx
from models.interop.parity import refuse_difference
from models.interop.targets import TARGETS, export_folder
from models.outputs import OUTPUTS
from models.sdxl import checkpoint_files, lora
from models.sdxl.family import ENCODERS, PARTS
from models.sdxl.lora_files import read_lora
from models.sdxl.names import part_state
from models.sdxl.networks import Networks, describe, load_networks, load_vae, open_networks
from models.sdxl.step import decode_to_levels
from models.sdxl.tokenizer import build_tokenizer
from models.sdxl.updates import Update
from models.sdxl.vae import unlike_sdxls
from utils.config.bounds import Positive
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.formats.thresholds import PER_TAG, ThresholdTable, find_thresholds
from utils.formats.vocabulary import vocabulary_of
from utils.io.files import readable
from utils.io.weights import WEIGHT_NAMES
from utils.record.logging import get_logger

log = get_logger(__name__)

_ONNX_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx"}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_SCRATCH = ".export-"
_REPOSITORY = "wd_repository"
_TAG_FILES = {"wd14": "model.onnx", "imgutils": "model.onnx", "cl_tagger": "model_optimized.onnx"}
_VAE_FILES = {"vae": "vae.safetensors", "vae_diffusers": "config.json", "vae_single_file": "model.safetensors"}
_LORA_FILES = {
    "kohya": ("lora.safetensors", lora.write_kohya),
    "lora_diffusers": ("pytorch_lora_weights.safetensors", lora.write_diffusers),
}


class HubConfig(Strict):
    """An upload to the hub; name: OWNER/NAME."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None
    private: bool
    dry_run: bool


class ExportConfig(Strict):
    """conf/export.yaml, checked. `weights`: best, last or ema of `run_dir`, or a weight file of Atelier."""

    format: Literal[
        "onnx", "timm", "transformers", "safetensors", "pth", "wd14", "imgutils", "cl_tagger",
        "wd_repository", "kohya", "lora_diffusers", "single_file", "diffusers",
        "vae", "vae_diffusers", "vae_single_file",
    ]  # fmt: skip
    run_dir: PathText | None
    weights: PathText
    output: PathText | None
    precision: Literal["fp32", "fp16"]
    dynamic_size: bool
    tolerance: Positive | None
    backbone_only: bool
    thresholds: PathText | None
    latent_statistics: bool
    license: str | None
    author: str | None
    description: str | None
    trigger: str | None
    card: PathText | None
    hub: HubConfig
    model: MovedBase
    dry_run: bool

    @property
    def accepted(self) -> float:
        """Return the largest accepted difference. Measured, with random and varied weights: at most 1e-6 and 2e-3."""
        return self.tolerance or {"fp32": 1e-3, "fp16": 2e-2}[self.precision]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.run_dir is None and self.weights in WEIGHT_NAMES:
            raise ValueError(f"run_dir: must be given for weights={self.weights}; add run_dir=RUN, or weights=FILE")
        if self.run_dir is None and self.output is None:
            raise ValueError("output: must be given without a run_dir; add output=FOLDER")
        if self.precision == "fp16" and self.format in TARGETS:
            raise ValueError(f"precision: format={self.format} ignores it; remove precision, or set format=onnx")
        if self.dynamic_size and self.format != "onnx":
            raise ValueError(f"dynamic_size: format={self.format} ignores it; remove it, or set format=onnx")
        if self.latent_statistics and self.format != "vae_diffusers":
            raise ValueError(
                f"latent_statistics: format={self.format} cannot state them; remove it, or set format=vae_diffusers"
            )
        return self


Format = Callable[[Weights, Path, ExportConfig], dict[str, Any]]


def write_folder(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the files of one of TARGETS. A tagger in timm's format has the outputs and selected_tags.csv of wd14.

    timm's taggers take BGR, like the published ones. Mean and standard deviation keep the order red, green, blue:
    neggles/wdv3-timm normalises, then reverses the channels. A backbone takes RGB, like every other network.
    """
    form, network, metadata = config.format, weights.whole, weights.metadata
    is_tagger = form == "timm" and weights.model.output.has_tags
    if form in ("timm", "transformers"):
        network = weights.model.network
    if is_tagger:
        vocabulary, preprocessing = vocabulary_of(metadata), {**metadata["preprocessing"], "pad": "none"}  # others pad
        kept, rows = tag_forms.to_wd_order(vocabulary)
        network = tag_forms.to_bgr(tag_forms.reorder_head(network, rows), preprocessing["image_size_hw"])
        metadata = {**metadata, **kept.facts(), "preprocessing": preprocessing}
    report = export_folder(form, network, metadata, folder, config.accepted)
    if is_tagger:
        tag_forms.write_tags(folder, kept, _thresholds(weights, config))
        report |= tag_forms.describe_changes(vocabulary, kept)
    return report


def _thresholds(weights: Weights, config: ExportConfig) -> ThresholdTable | None:
    return find_thresholds(config.thresholds, weights.path, weights.metadata.get("weights_hash"))


def write_onnx(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write an ONNX file."""
    path = folder / _ONNX_FILES[config.precision]
    settings = config.precision, config.accepted, config.dynamic_size
    return {"file": path.name, "onnx_max_abs_diff": export_onnx(weights.model, weights.metadata, path, *settings)}


def write_tagger(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write an ONNX file in a form of models/interop/tag_forms.py, and the form's other files."""
    form, vocabulary, preprocessing = config.format, vocabulary_of(weights.metadata), weights.metadata["preprocessing"]
    tag_forms.check_images(form, preprocessing)
    thresholds = _thresholds(weights, config)
    kept, rows = tag_forms.to_wd_order(vocabulary) if form == "wd14" else (vocabulary, list(range(len(vocabulary))))
    onnx_form = tag_forms.make_form(form, preprocessing)
    graph = tag_forms.make_graph(weights.model, onnx_form, rows, preprocessing["image_size_hw"])
    metadata = {**weights.metadata, **kept.facts(), "form": onnx_form.model_dump()}
    metadata |= {} if thresholds is None else {"thresholds": thresholds.of_tags(kept, PER_TAG)}
    path = folder / _TAG_FILES[form]
    difference = export_onnx(graph, metadata, path, config.precision, config.accepted, config.dynamic_size)
    if form == "wd14":
        tag_forms.write_tags(folder, kept, thresholds)
        tag_forms.write_head(folder, graph.network)
    elif form == "imgutils":
        tag_forms.write_imgutils(folder, kept, thresholds, preprocessing)
    else:
        tag_forms.write_mapping(folder, kept)
    return {"file": path.name, "onnx_max_abs_diff": difference, **tag_forms.describe_changes(vocabulary, kept)}


def write_repository(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write one folder for all programs: the files of timm and of wd14, which share selected_tags.csv."""
    timm = write_folder(weights, folder, config.model_copy(update={"format": "timm"}))
    return {**timm, **write_tagger(weights, folder, config.model_copy(update={"format": "wd14"}))}


# --------------------------------------------------------------------------------------------------------------- SDXL


def write_lora(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write only the LoRA: for ComfyUI, the web UIs and sd-scripts (kohya), or for diffusers.

    It is read again, and the updates of all layers are compared, as are a DoRA's magnitudes.
    """
    if weights.setup.task.lora is None:
        raise UserError(f"format: {config.format} is for a LoRA, but this run trained the U-Net; set single_file")
    if (kind := weights.setup.task.lora.kind) != "lora" and config.format == "lora_diffusers":
        raise UserError(f"format: lora_diffusers is for kind=lora, not {kind}; set format=kohya, or diffusers (merged)")
    if values := unlike_sdxls(weights.setup.model.vae_values):
        log.warning("format: the LoRA learnt latents of a VAE with %s, unlike SDXL's; use it with this VAE", values)
    file, write = _LORA_FILES[config.format]
    write(folder / file, weights.task.adapter, _DTYPES[config.precision], _facts(weights, config))
    with torch.device("meta"):
        shapes = open_networks(weights.setup.model, ("unet", *ENCODERS))
    read, layers = read_lora(folder / file, shapes), weights.task.adapter.layers()
    if layers.keys() != read.keys():
        raise UserError(f"output: {file} has other layers than the run; check the disk, and export again")
    differences = []
    for values in (Update.matrix, Update.magnitude):
        pairs = [(values(layer.update()).detach().cpu(), values(read[name])) for name, layer in layers.items()]
        largest = max(float(wanted.abs().max()) for wanted, _ in pairs)
        differences += [float((found - wanted).abs().max()) / (largest or 1.0) for wanted, found in pairs]
    difference = max(differences)
    refuse_difference(difference, config.accepted, file)
    return {"file": file, "update_max_abs_diff": difference}


def _given(weights: Weights, config: ExportConfig) -> dict[str, str | None]:
    """Return the user's facts. Without `trigger`, it is the prefix of all captions."""
    prefix = dict_of(dict_of(weights.metadata, "task"), "captions").get("prefix")
    return {"author": config.author, "description": config.description, "trigger": config.trigger or prefix or None}


def _facts(weights: Weights, config: ExportConfig) -> dict[str, str]:
    return modelspec_facts(weights, _given(weights, config))


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


def write_whole(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the whole model: a diffusers folder, or a single file, which is read back and compared."""
    settings, dtype, networks = weights.setup.task, _DTYPES[config.precision], whole_networks(weights)
    if padding := networks["vae"].config.get("padding_mode"):
        log.warning("format: other programs ignore padding_mode=%s of the VAE: pictures differ at borders", padding)
    noise = settings.stated_noise
    if config.format == "diffusers":
        zeros = settings.captions.dropout_to == "zeros"
        checkpoint_files.write_diffusers(
            folder, networks, build_tokenizer(), dtype=dtype, zeros_for_empty_prompt=zeros, **noise
        )
        return {"file": "model_index.json", **_compare_whole(folder, networks, noise, config)}
    path = folder / "model.safetensors"
    checkpoint_files.write_single_file(path, networks, dtype=dtype, facts=_facts(weights, config), **noise)
    return {"file": path.name, **_compare_whole(path, networks, noise, config)}


def _compare_whole(path: Path, networks: Networks, noise: dict[str, Any], config: ExportConfig) -> dict[str, float]:
    """Read a file or folder again, and compare its tensors, its noise schedule and what its VAE decodes.

    Raises UserError (`output`, `tolerance`) if something differs.
    """
    folds, said, read = config.format == "single_file", describe(path), load_networks(path)
    wrong = [name for name, value in noise.items() if (said[name] or False) != value]
    for part, state in checkpoint_files.cast_states(networks, _DTYPES[config.precision], folds=folds).items():
        found = part_state(part, read[part])
        wrong += [f"{part}.{name}" for name, one in state.items() if not torch.equal(found[name], one.float())]
    if wrong:
        raise UserError(f"output: {len(wrong)} values were not written as they are, such as {wrong[0]}; check the disk")
    return _compare_vae(networks["vae"], read["vae"], config)


def _compare_vae(vae: nn.Module, read: nn.Module, config: ExportConfig) -> dict[str, float]:
    """Compare what both VAEs decode, each with its own values. Raises UserError (`tolerance`)."""
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (decode_to_levels(network.float(), latents) for network in (vae, read))
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    refuse_difference(difference, config.accepted, "the VAE in the file")
    return {"vae_max_abs_diff": difference}


def write_vae(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write a VAE: alone, for ComfyUI or diffusers, or with the base model's other networks in a single file.

    It is read back, and its pictures are compared with those of the run's VAE. A frozen encoder is the base model's.
    """
    model, vae, dtype = weights.setup.model, weights.task.vae, _DTYPES[config.precision]
    if config.latent_statistics:
        measured, channels = read_figures(weights, config.run_dir), range(vae.config.latent_channels)
        if "latent_mean_0" not in measured:
            raise UserError("latent_statistics: first run evaluate.py with these run_dir and weights; it measures them")
        mean, std = ([measured[f"latent_{name}_{channel}"] for channel in channels] for name in ("mean", "std"))
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    file = _VAE_FILES[config.format]
    if config.format == "vae_diffusers":
        checkpoint_files.write_vae_folder(folder, vae, dtype)
    elif config.format == "vae":
        checkpoint_files.write_vae_file(folder / file, vae, dtype, _facts(weights, config))
    else:
        if model.path is None:
            raise UserError("format: vae_single_file needs the other networks of a base model; set format=vae")
        base = describe(model.path)
        networks = open_networks(model, [part for part in PARTS if part != "vae"]) | {"vae": vae}
        noise = {name: base[name] for name in ("prediction_type", "zero_terminal_snr", "shift")}
        checkpoint_files.write_single_file(folder / file, networks, dtype=dtype, facts=_facts(weights, config), **noise)
    read = load_vae(folder if config.format == "vae_diffusers" else folder / file)
    return {"file": file, **_compare_vae(vae, read, config)}


# ---------------------------------------------------------------------------------------------------------- the table

FORMATS: dict[str, Format] = {
    "onnx": write_onnx,
    **dict.fromkeys(TARGETS, write_folder),
    **dict.fromkeys(_TAG_FILES, write_tagger),
    _REPOSITORY: write_repository,
    **dict.fromkeys(_LORA_FILES, write_lora),
    **dict.fromkeys(("single_file", "diffusers"), write_whole),
    **dict.fromkeys(_VAE_FILES, write_vae),
}


def find_format(name: str, weights: Weights) -> Format:
    """Return the function that writes a format. Raises UserError (`format`) if the weights do not support it."""
    formats = weights.kind.formats if weights.model is None else weights.model.output.formats
    if name not in formats:
        raise UserError(f"format: {name} is no format of {weights.path}; it supports {', '.join(formats) or 'none'}")
    return FORMATS[name]


def write_export(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the files of `config.format` into a folder, and return the report.

    Raises UserError (`format`, `tolerance`, `output`). In that case nothing is written and older files stay.
    """
    write, thresholds = find_format(config.format, weights), None
    if weights.metadata["output"] and OUTPUTS[weights.metadata["output"]].has_tags:
        thresholds = _thresholds(weights, config)
    more = ""
    if config.card is not None:
        with about("card"), readable(Path(config.card), "Markdown"):
            more = Path(config.card).read_text(encoding="utf-8")
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    for leftover in folder.glob(f"{_SCRATCH}*"):  # of a killed export
        shutil.rmtree(leftover)
    with TemporaryDirectory(dir=parent, prefix=_SCRATCH) as scratch:
        report = write(weights, Path(scratch), config)
        write_card(
            weights, Path(scratch), config.format, report["file"],
            run_dir=config.run_dir, thresholds=thresholds, about=_given(weights, config), more=more,
        )  # fmt: skip
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        report["files"] = [path.relative_to(scratch).as_posix() for path in paths]
        for path in paths:
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return report
