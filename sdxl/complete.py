"""What a run of SDXL takes from its files: the VAE's values, the noise, the LoRA that goes on, prompts and concepts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data.collection.concepts import find_repeats
from models.interop.metadata import dict_of
from sdxl.config import LoRAConfig, NoiseConfig, SDXLTrainingConfig
from sdxl.files.networks import describe, open_networks, settle_model
from sdxl.lora.lora import ADAPTED
from sdxl.lora.lora_files import describe_lora, refuse_other_values
from sdxl.pictures.prompts import count_brackets, read_prompts
from utils.config.messages import validate
from utils.errors import UserError, about
from utils.io.files import Json
from utils.io.weight_files import InitFrom
from utils.record.logging import get_logger
from utils.record.run_reader import run_of

log = get_logger(__name__)


def complete(config: SDXLTrainingConfig, words: Sequence[str]) -> SDXLTrainingConfig:
    """Return the configuration with the values of the VAE, the noise of the base model, the LoRA that is continued,
    the trigger in captions, the prompts of a file, and folders `10_name` as concepts.

    They are recorded, and compared on resume.
    """
    values = config.model_dump()
    values["model"] = settle_model(config.model)
    task = values["task"]
    task["noise"] = settle_noise(config.task.noise, config.model.path)
    if config.task.lora is not None and config.init_from is not None:
        task["lora"] = _continue_lora(config, words).model_dump()
    if isinstance(config.task.samples.prompts, str):
        task["samples"]["prompts"] = read_prompts(
            config.task.samples.prompts, config.task.samples.image_size_hw, "task.samples.prompts"
        )
    data = config.data
    concepts = data.concepts
    if concepts is None and data.name == "image_folder":
        concepts = find_repeats(data.root) or None
    if data.trigger is not None:
        if config.data.concepts or config.task.captions.prefix:
            raise UserError(
                f"data.trigger: {data.trigger!r} is the trigger of all images; remove it where data.concepts or "
                "task.captions.prefix states others"
            )
        task["captions"]["prefix"] = data.trigger
        concepts = concepts and [concept.without_trigger() for concept in concepts]
    values["data"]["concepts"] = concepts
    complete = validate(values, type(config))
    texts = [prompt.words for prompt in complete.task.samples.complete_all()]
    count_brackets(texts, config.task.captions.emphasis, "task.samples.prompts (task.captions.emphasis)")
    return complete


def _continue_lora(config: SDXLTrainingConfig, words: Sequence[str]) -> LoRAConfig:
    """Return the LoRA of `init_from`, or of the run that goes on, whose source may be gone."""
    begun = config.run_dir and run_of(Path(config.run_dir))
    known = begun.config if begun else {}
    if known.get("init_from") == config.init_from and dict_of(known, "task").get("lora"):
        found = LoRAConfig.model_validate(known["task"]["lora"])
    else:
        with torch.device("meta"):
            shapes = open_networks(config.model, ADAPTED)
        with about("init_from"):
            found = describe_lora(InitFrom(config.init_from, config.init_weights).find(), shapes)
    refuse_other_values(found, config.task.lora, words)
    return found


def settle_noise(noise: NoiseConfig, path: str | None) -> Json:
    """Return the values of the noise, without auto. path: of the base model; None: a tiny one."""
    values = noise.model_dump()
    if "auto" not in (noise.prediction_type, noise.zero_terminal_snr):
        return values
    own = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    base = own if path is None or noise.convert else describe(path)
    kind = base["prediction_type"] if noise.prediction_type == "auto" else noise.prediction_type
    if noise.zero_terminal_snr == "auto":
        # A file that does not say it is sampled without.
        values["zero_terminal_snr"] = base["prediction_type"] == kind and bool(base["zero_terminal_snr"])
    if base.get("is_stated"):
        log.info("task.noise: %s predicts %s, which is trained", path, kind)
    elif base is not own and noise.prediction_type == "auto":
        log.warning(
            "task.noise: %s does not say what it predicts and is trained as %s, as programs use it; if its "
            "author says v, set task.noise.convert=true task.noise.prediction_type=v_prediction", path, kind,
        )  # fmt: skip
    return {**values, "prediction_type": kind}
