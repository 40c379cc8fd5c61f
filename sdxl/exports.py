"""The formats of export.py for SDXL and its VAE, and the program in the cards."""

from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import nn

from engine.exports.config import FORMATS, ExportConfig, Format
from engine.exports.formats import given_facts
from engine.exports.opened_task import OpenedTask
from models.interop.metadata import base_model
from models.interop.parity import refuse_difference
from sdxl.config import SamplesConfig
from sdxl.files.checkpoints import cast_state, save_part, save_pipeline, save_single_file
from sdxl.files.facts import state_facts
from sdxl.files.family import PARTS, SCHEDULE
from sdxl.files.names import part_state
from sdxl.files.tokenizer import build_tokenizer
from sdxl.lora.changes import READERS
from sdxl.lora.files import adapter_state
from sdxl.lora.lora import adapted_shapes, save_lora
from sdxl.networks import Networks, describe_base, load_networks, load_vae, open_networks
from sdxl.pictures.sampling import scheduler_config
from sdxl.step import decode_to_levels
from sdxl.vae import unlike_sdxls
from utils.errors import UserError
from utils.io.files import Json, Values
from utils.record.logging import log

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Entry = Json  # of export.json


def write_kohya(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write only the LoRA, read it again, and compare its tensors."""
    if weights.setup.task.lora is None:
        raise UserError(f"format: {config.format} is for a LoRA, but this run trained the U-Net; set single_file")
    if values := unlike_sdxls(weights.setup.model.vae_values):
        log.warning("format: the LoRA learnt latents of a VAE with %s, unlike SDXL's; use it with this VAE", values)
    path = folder / FORMATS["kohya"].file
    adapter = weights.task.adapter
    save_lora(path, adapter.changes(), DTYPES[config.precision], modelspec_facts(weights, config))
    read = adapter_state(path, adapted_shapes(weights.setup.model))
    # float16 rounds tensors of smaller numbers coarsely.
    difference = max(
        float((read[name] - tensor.cpu()).abs().max() / tensor.abs().max().clamp_min(1e-3))
        for name, tensor in adapter.state_dict().items()
    )
    refuse_difference(difference, config.accepted, path.name)
    return {"max_abs_diff": difference}


def modelspec_facts(weights: OpenedTask, config: ExportConfig) -> dict[str, str]:
    """Return the facts for `write_modelspec`, with those that the user gives."""
    given = given_facts(weights, config)
    given["trigger_phrase"] = given.pop("trigger")
    facts = state_facts(weights.title, weights.setup.task, weights.metadata, weights.run)
    return facts | {name: text for name, text in given.items() if text}


def whole_networks(weights: OpenedTask) -> Networks:
    """Return all of a run's networks, with its LoRA merged. Raises UserError if the base model is not the run's."""
    task = weights.task
    networks = open_networks(weights.setup.model, [part for part in PARTS if part not in task.exported])
    task.take(networks)
    weights.check_helpers()
    if weights.setup.task.lora is None:
        return networks | {name: task.get_submodule(name) for name in task.exported}
    task.adapter.merge(networks)
    return networks


def write_diffusers(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write the whole model as a folder of diffusers."""
    write = partial(
        save_pipeline,
        tokenizer=build_tokenizer(),
        zeros_for_empty_prompt=weights.setup.task.captions.dropout_to == "zeros",
    )
    return _write_whole(write, weights, folder, config)


def write_single_file(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write the whole model as a single file."""
    write = partial(save_single_file, facts=modelspec_facts(weights, config))
    return _write_whole(write, weights, folder / FORMATS["single_file"].file, config)


def _write_whole(save: Any, weights: OpenedTask, path: Path, config: ExportConfig) -> Entry:
    """Write a file or folder, read it again, and compare its tensors, its noise schedule and what its VAE decodes.

    Raises UserError (`output`, `tolerance`) if something differs.
    """
    networks = whole_networks(weights)
    if padding := networks["vae"].config.get("padding_mode"):
        log.warning("format: other programs ignore padding_mode=%s of the VAE: pictures differ at borders", padding)
    dtype = DTYPES[config.precision]
    noise = weights.setup.task.stated_noise
    save(path, networks, dtype=dtype, **noise)
    stated = describe_base(path)
    wrong = [name for name, value in noise.items() if (stated[name] or False) != value]
    read = load_networks(path)
    for part, network in networks.items():
        written = part_state(part, read[part])
        state = cast_state(part, network, dtype, folds=path.is_file())
        wrong += [f"{part}.{name}" for name, one in state.items() if not torch.equal(written[name], one.float())]
    if wrong:
        raise UserError(f"output: {len(wrong)} values were not written as they are, such as {wrong[0]}; check the disk")
    return _compare_vae(networks["vae"], read["vae"], config)


def _compare_vae(vae: nn.Module, read: nn.Module, config: ExportConfig) -> Entry:
    """Compare the images that both VAEs decode, with the values of each VAE. Raises UserError (`tolerance`)."""
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (decode_to_levels(network.float(), latents) for network in (vae, read))
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    refuse_difference(difference, config.accepted, "the VAE in the file")
    return {"vae_max_abs_diff": difference}


def write_vae(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write a VAE for ComfyUI, with the base model's encoder; read it again, and compare its pictures."""
    path = folder / FORMATS["vae"].file
    vae = weights.task.vae
    save_single_file(path, {"vae": vae}, dtype=DTYPES[config.precision], facts=modelspec_facts(weights, config))
    return _compare_vae(vae, load_vae(path), config)


def write_vae_diffusers(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write a VAE for diffusers."""
    vae = weights.task.vae
    save_part(folder, "vae", vae, DTYPES[config.precision])
    return _compare_vae(vae, load_vae(folder), config)


def describe_use(form: Format, metadata: Values, file: str) -> str:
    """Return the program that draws the first prompt of a task, as its evaluation does, or decodes an image again.

    Of an adapter that diffusers does not read, return who reads it.
    """
    task = metadata["task"]
    if form.is_adapter and task["lora"]["kind"] != "lora":
        return f"Read by {READERS[task['lora']['kind']]}."
    loaded = Template(form.load).substitute(file=file, base=repr(base_model(metadata) or "PATH OF THE BASE MODEL"))
    if "samples" not in task:
        return _fill("program_vae", load=loaded)
    samples = SamplesConfig.model_validate(task["samples"])
    noise = task["noise"]
    values = samples.complete(samples.prompts[0] if samples.prompts else "...", 0).model_dump()
    values |= {name: ascii(values[name]) for name in ("text", "negative")}
    values["height"], values["width"] = values["image_size_hw"]
    stated = noise["prediction_type"], noise["zero_terminal_snr"], task["timesteps"]["shift"]
    scheduler = scheduler_config(*stated, samples.sampler)
    values["class"] = scheduler.pop("_class_name")
    values["scheduler"] = {name: value for name, value in scheduler.items() if name not in SCHEDULE}
    return _fill("program_sdxl", **values, load=loaded)


def _fill(name: str, **values: Any) -> str:
    text = Template((Path(__file__).parent / f"{name}.txt").read_text("utf-8")).substitute(values)
    return f"```python\n{text.rstrip()}\n```"
