"""Draw pictures of prompts with SDXL, a run's or a base model: predict.py prompts=FILE.

    prompts = config.complete_all(read_prompt_file("prompts.txt", config.image_size_hw))
    painter = open_painter("outputs/sdxl", moved, ["style.safetensors:0.8"], device, config)
    draw(painter, prompts, Path("pictures"), existing=None)

Source: AUTOMATIC1111/stable-diffusion-webui:modules/processing.py, create_infotext.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from engine.exports.config import MovedBase
from engine.exports.opened_task import open_task
from engine.judging.config import PredictConfig
from engine.task import FILE_HASHES
from engine.update.batch_size import naming_memory
from sdxl.config import DrawConfig, Prompt, SDXLConfig
from sdxl.exports import whole_networks
from sdxl.files.family import ENCODERS, SAMPLERS
from sdxl.lora.files import read_lora
from sdxl.lora.lora import add_changes
from sdxl.networks import Networks, base_files, describe_base, open_networks
from sdxl.pictures.prompts import count_brackets, read_prompt_file, spell_prompt
from sdxl.pictures.sampling import encode_prompt, sample_pictures, scheduler_config
from sdxl.task import DiffusionTask
from sdxl.vae import AS_STATED
from utils.config.entry_point import Job
from utils.errors import UserError, about
from utils.hardware import choose_device
from utils.io.files import output_errors, refuse_links_out, sha256_file, write_atomically
from utils.io.journal import open_journal
from utils.io.memo import hash_once
from utils.io.weight_files import find_weights
from utils.io.weights import read_weights
from utils.record.figures import INK
from utils.record.pictures import image_grid, wrap
from utils.record.progress import track


@dataclass(frozen=True)
class Painter:
    """SDXL's networks with all LoRAs merged, and how to sample them.

    encoding: options of `encode_prompt`. hashes: of all files. loras: the name, strength and hash of each LoRA.
    """

    name: str
    networks: Networks
    scheduler: dict[str, object]
    encoding: dict[str, bool]
    hashes: list[str]
    loras: list[tuple[str, float, str]]

    def describe(self, prompt: Prompt) -> str:
        """Return a picture's `parameters` as the web UIs write them."""
        height, width = prompt.image_size_hw
        settings = {
            "Steps": prompt.steps,
            "Sampler": "Euler" if self.scheduler.get("solver_order") == 1 else SAMPLERS[self.scheduler["_class_name"]],
            "CFG scale": f"{prompt.guidance:g}",
            "Seed": prompt.seed,
            "Size": f"{width}x{height}",
        }
        settings |= {
            "Model hash": self.hashes[0][:10],
            "Model": self.name,
            "CFG Rescale": f"{prompt.guidance_rescale:g}",
        }
        if self.loras:
            settings["Lora hashes"] = ", ".join(f"{name}: {digest[:12]}" for name, _, digest in self.loras)
        settings["Version"] = "Atelier"
        text, negative = (spell_prompt(part, self.encoding["emphasis"]) for part in (prompt.text, prompt.negative))
        lines = [text + "".join(f" <lora:{name}:{strength:g}>" for name, strength, _ in self.loras)]
        if negative:
            lines.append(f"Negative prompt: {negative}")
        lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in settings.items()))
        return "\n".join(lines)

    def paint(self, prompts: Sequence[Prompt]) -> Iterator[np.ndarray]:
        """Yield a picture per complete prompt, uint8 [H, W, 3]."""
        encoders = [self.networks[part] for part in ENCODERS]
        encoded = (encode_prompt(encoders, prompt, **self.encoding) for prompt in prompts)
        with naming_memory("pictures.image_size_hw"):
            yield from sample_pictures(self.networks["unet"], self.networks["vae"], self.scheduler, prompts, encoded)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if {*text} & {*",:\n"} else text


def open_painter(
    weights: str, moved: MovedBase, loras: Sequence[str], device: torch.device, pictures: DrawConfig
) -> Painter:
    """Open a run, a weight file, or a base model (a folder of diffusers or a single file), and merge LoRAs.

    moved: where the base model of the run and its VAE are, if they were moved; or another VAE for a base model. loras:
    FILE or FILE:STRENGTH. On a GPU, all networks but the VAE are in bfloat16. pictures: has the sampler and `emphasis`.

    Raises UserError (`weights`, `model.path`, `lora`).
    """
    with about("weights"):
        path = Path(weights) if Path(weights, "model_index.json").is_file() else find_weights(weights, "best")
        if path.is_dir() or (path.suffix == ".safetensors" and "task" not in read_weights(path, shapes_only=True)[1]):
            facts = describe_base(path)
            if wrong := facts["other_noise"] or (moved.path and "model.path is only for runs"):
                raise UserError(f"{path} is a base model that cannot be sampled so: {wrong}")
            model = SDXLConfig.model_construct(
                name="sdxl", path=str(path), vae=moved.vae, vae_values=AS_STATED, frozen_dtype="float32"
            )
            networks = open_networks(model)
            files = base_files(model)
            noise = {name: facts[name] for name in ("prediction_type", "zero_terminal_snr", "shift")}
            encoding = {"zeros_for_empty_prompt": facts["zeros_for_empty_prompt"], "emphasis": False}
        else:
            opened = open_task(path, base=moved)
            if not isinstance(opened.task, DiffusionTask):
                raise UserError(f"{path} draws no pictures: prompts is for SDXL; set input for this one")
            networks = whole_networks(opened)
            files = [path]
            task = opened.setup.task
            noise = task.stated_noise
            encoding = task.encoding
        if pictures.emphasis is not None:
            encoding["emphasis"] = pictures.emphasis
    with about("pictures.sampler"):
        scheduler = scheduler_config(**noise, sampler=pictures.sampler)
    merged = []
    for text in loras:
        with about("lora"):
            name, strength = read_strength(text)
            file = find_weights(name, "best")
            add_changes(networks, read_lora(file, networks), strength)
            merged.append((Path(name).stem, strength, hash_once(file, FILE_HASHES)))
    for part, network in networks.items():
        dtype = torch.float32 if device.type == "cpu" or part == "vae" else torch.bfloat16
        nn.Module.to(network, device, dtype)  # because diffusers' own `to` warns
    hashes = [hash_once(file, FILE_HASHES) for file in files]
    return Painter(Path(weights).name, networks, scheduler, encoding, hashes, merged)


def read_strength(text: str) -> tuple[str, float]:
    """Return the file or run of FILE:STRENGTH, and the strength. Raises UserError."""
    name, _, number = text.rpartition(":")
    if not name or Path(text).exists():
        return text, 1.0
    if not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise UserError(f"{text} is no file, and no FILE:0.8 with a number after the colon; write one of them")
    return name, float(number)


def draw(
    painter: Painter, prompts: Sequence[Prompt], folder: Path, existing: Literal["skip", "overwrite"] | None
) -> tuple[list[Path], int]:
    """Write NUMBER-SEED.png for each prompt. Return the files, and how many of them this call drew.

    A repeated command draws the missing pictures. Raises UserError (`existing`) for pictures of other commands.
    """
    files = {folder / f"{number:05}-{prompt.seed}.png": prompt for number, prompt in enumerate(prompts)}
    texts = {file: painter.describe(prompt) for file, prompt in files.items()}
    count_brackets([prompt.words for prompt in prompts], painter.encoding["emphasis"], "prompts (pictures.emphasis)")
    refuse_links_out("output", folder)
    with open_journal("output", folder, [painter.hashes, existing, *texts.values()], is_folder=True) as journal:
        written = {folder / name: digest for name, digest in journal.parts()}
        others = {file for file in files if file not in written and file.exists()}
        if others and existing is None:
            raise UserError(
                f"existing: null, but {min(others)} is a picture of another command; set skip or overwrite, or name "
                "another output"
            )
        done = {file for file, digest in written.items() if file.is_file() and sha256_file(file) == digest}
        if existing == "skip":
            done |= others
        waiting = [file for file in files if file not in done]
        drawn = zip(waiting, painter.paint([files[file] for file in waiting]))
        for file, pixels in track(drawn, len(waiting), "drawing"):
            info = PngInfo()
            info.add_text("parameters", texts[file])
            Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG", pnginfo=info)
            content = stream.getvalue()
            # Before the file, which would otherwise count as another command's.
            journal.add([file.name, hashlib.sha256(content).hexdigest()])
            write_atomically(file, lambda temporary, content=content: temporary.write_bytes(content), flush=False)
    return [*files], len(waiting)


def draw_prompts(config: PredictConfig, job: Job) -> str:
    """Draw the pictures of `prompts`. Return the line of the result.

    With several weights, each has a folder, and grid.png shows all pictures.
    """
    device = torch.device(choose_device(config.device, "device"))
    prompts = config.pictures.complete_all(read_prompt_file(config.prompts, config.pictures.image_size_hw))
    folder = Path(config.output)
    drawn = 0
    tiles = []
    for number, weights in enumerate(config.weights):
        place = folder if len(config.weights) == 1 else folder / f"{number}-{Path(weights).stem}"
        painter = open_painter(weights, config.model, config.lora, device, config.pictures)
        if not config.dry_run:
            files, new = draw(painter, prompts, place, config.existing)
            drawn += new
            pairs = zip(files, prompts)
            tiles += [(np.asarray(Image.open(file)), f"{place.name}: {prompt.text}") for file, prompt in pairs]
        del painter  # before the next one is opened
    total = len(prompts) * len(config.weights)
    if config.dry_run:
        return f"dry run: {total} pictures, nothing is drawn"
    if len(config.weights) > 1:
        pictures, texts = zip(*tiles)
        captions = [[(line, INK) for line in wrap(text, 3)] for text in texts]
        grid = image_grid(pictures, captions, str(folder), columns=len(prompts), tile_px=258)
        with output_errors("output", folder):
            Image.fromarray(grid).save(folder / "grid.png")
    return f"wrote {folder}: {drawn} pictures, {total - drawn} there already"
