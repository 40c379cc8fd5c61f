"""The schema of `task=diffusion`: noise, loss, timesteps, and which settings exclude each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from data.collection.concepts import find_repeats
from data.tags.captions import CaptionConfig
from data.tags.tag_weights import TagWeightsConfig
from engine.config import TrainingConfig
from engine.tasks.kind import TaskConfig
from models.interop.metadata import dict_of
from sdxl import step as sdxl
from sdxl.caches.buckets import BucketConfig
from sdxl.caches.masks import MaskConfig
from sdxl.files.networks import describe, open_networks
from sdxl.judge import JudgeConfig
from sdxl.latent_perceptual import LatentPerceptualConfig
from sdxl.lora.lora import ADAPTED, LoRAConfig
from sdxl.lora.lora_files import describe_lora, refuse_other_values
from sdxl.pictures.prompts import count_brackets, read_prompts
from sdxl.pictures.sampling import SamplesConfig
from utils.config.bounds import Count, Factor, Fraction, Positive
from utils.config.messages import validate
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.io.files import Json
from utils.io.weights import InitFrom
from utils.record.logging import get_logger
from utils.record.run_reader import run_of

log = get_logger(__name__)


class NoiseConfig(Strict):
    """The prediction type and the noise schedule.

    auto: those of the base model; to convert one, or without one, v_prediction with zero terminal SNR.
    convert: accept a base model with another prediction type or noise schedule, and train it towards this one.
    offset: strength of a random brightness in the noise; 0 is off.
    """

    prediction_type: Literal["auto"] | sdxl.PredictionType
    zero_terminal_snr: Literal["auto"] | bool
    convert: bool
    offset: Fraction

    @model_validator(mode="after")
    def _has_a_target_everywhere(self) -> Self:
        if self.zero_terminal_snr is True and self.prediction_type not in ("auto", "v_prediction"):
            raise ValueError(
                f"task.noise.zero_terminal_snr: true is for v_prediction, not {self.prediction_type}: in pure noise, "
                "epsilon has nothing to predict, and flow always ends in it; set "
                "task.noise.zero_terminal_snr=false, or task.noise.prediction_type=v_prediction"
            )
        return self

    def settled(self, path: str | None) -> Json:
        """Return the values, without auto. path: of the base model; None: a tiny one."""
        values = self.model_dump()
        if "auto" not in (self.prediction_type, self.zero_terminal_snr):
            return values
        own = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
        base = own if path is None or self.convert else describe(path)
        kind = base["prediction_type"] if self.prediction_type == "auto" else self.prediction_type
        if self.zero_terminal_snr == "auto":
            # A file that does not say it is sampled without.
            values["zero_terminal_snr"] = base["prediction_type"] == kind and bool(base["zero_terminal_snr"])
        if base.get("is_stated"):
            log.info("task.noise: %s predicts %s, which is trained", path, kind)
        elif base is not own and self.prediction_type == "auto":
            log.warning(
                "task.noise: %s does not say what it predicts and is trained as %s, as programs use it; if its "
                "author says v, set task.noise.convert=true task.noise.prediction_type=v_prediction", path, kind,
            )  # fmt: skip
        return {**values, "prediction_type": kind}


class LossConfig(Strict):
    """Weights of the loss by noise level, explained at `loss_weight` in sdxl/step.py.

    perceptual: adds a loss of the VAE's decoder at low noise (sdxl/latent_perceptual.py).
    """

    weighting: sdxl.Weighting
    gamma: Positive
    floor: Factor
    perceptual: LatentPerceptualConfig | None


class TimestepsConfig(Strict):
    """How to draw timesteps. shift: see `shift_times` in sdxl/step.py."""

    sampling: sdxl.TimestepSampling
    shift: Annotated[float, Field(ge=0.01, le=100)]


class DiffusionTaskConfig(TaskConfig):
    """SDXL on captioned images."""

    name: Literal["diffusion"]
    noise: NoiseConfig
    loss: LossConfig
    timesteps: TimestepsConfig
    buckets: BucketConfig
    chunk: Count  # consecutive samples of one bucket; a micro-batch is a part of a chunk
    captions: CaptionConfig
    caption_chunks: Annotated[int, Field(ge=1, le=32)]  # of 75 tokens; a longer caption is cut
    mask: MaskConfig | None  # null: the loss counts everywhere
    tag_weights: TagWeightsConfig | None  # null: all images have the same weight
    lora: LoRAConfig | None  # null: train the whole U-Net
    train_text_encoders: bool  # the whole encoders, together with the whole U-Net
    latent_cache: PathText | None  # a folder; null: encode images at every step
    text_cache: PathText | None  # a folder; null: encode captions at every step
    text_variants: Count  # per caption in the text cache
    samples: SamplesConfig
    judge: JudgeConfig | None  # null: off
    preference_beta: Positive | None = None  # null: off; a run from before this key has none

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders change in training."""
        return self.train_text_encoders or (self.lora is not None and self.lora.trains_text)

    @property
    def stated_noise(self) -> Json:
        """Return the noise as exports state it and as pictures are sampled: arguments of `scheduler_config`."""
        stated = self.noise.model_dump(include={"prediction_type", "zero_terminal_snr"})
        if self.noise.prediction_type == "flow":
            stated["shift"] = self.timesteps.shift
        return stated

    @property
    def encoding(self) -> dict[str, bool]:
        """Return how prompts are encoded: options of `encode_prompt`."""
        return {"zeros_for_empty_prompt": self.captions.dropout_to == "zeros", "emphasis": self.captions.emphasis}

    def complete(self, config: TrainingConfig, words: Sequence[str] = ()) -> TrainingConfig:
        """Return the configuration with the values of the VAE, the noise of the base model, the LoRA that is continued,
        the trigger in captions, the prompts of a file, and folders `10_name` as concepts.

        They are recorded, and compared on resume.
        """
        values = config.model_dump()
        values["model"] = config.model.settled()
        task = values["task"]
        task["noise"] = self.noise.settled(config.model.path)
        if self.lora is not None and config.init_from is not None:
            task["lora"] = self._continue_lora(config, words).model_dump()
        if isinstance(self.samples.prompts, str):
            task["samples"]["prompts"] = read_prompts(
                self.samples.prompts, self.samples.image_size_hw, "task.samples.prompts"
            )
        data = config.data
        concepts = data.concepts
        if concepts is None and data.name == "image_folder":
            concepts = find_repeats(data.root) or None
        if data.trigger is not None:
            if config.data.concepts or self.captions.prefix:
                raise UserError(
                    f"data.trigger: {data.trigger!r} is the trigger of all images; remove it where data.concepts or "
                    "task.captions.prefix states others"
                )
            task["captions"]["prefix"] = data.trigger
            concepts = concepts and [concept.without_trigger() for concept in concepts]
        values["data"]["concepts"] = concepts
        complete = validate(values, type(config))
        texts = [prompt.words for prompt in complete.task.samples.complete_all()]
        count_brackets(texts, self.captions.emphasis, "task.samples.prompts (task.captions.emphasis)")
        return complete

    def _continue_lora(self, config: TrainingConfig, words: Sequence[str]) -> LoRAConfig:
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
        refuse_other_values(found, self.lora, words)
        return found

    def check_run(self, config: TrainingConfig) -> None:
        """Raise ValueError if two settings exclude each other."""
        if config.loop.sampling != "shuffled":
            raise ValueError(
                f"loop.sampling: {config.loop.sampling} does not work with task=diffusion, which orders images by "
                "bucket; set loop.sampling=shuffled (task.tag_weights gives rare tags more weight)"
            )
        if self.noise.prediction_type == "flow" and self.loss.weighting != "none":
            raise ValueError(
                f"task.loss.weighting: {self.loss.weighting} is for epsilon and v; flow has its plain error, and "
                "task.timesteps says how often each noise level comes; set task.loss.weighting=none"
            )
        if self.lora is not None and self.train_text_encoders:
            raise ValueError(
                "task.train_text_encoders: true trains the whole encoders, but task.lora is set; add "
                "'text_encoder*_proj' to task.lora.targets to train them by LoRA, or set task.lora=null"
            )
        if config.model.frozen_dtype == "float8" and (self.lora is None or config.runtime.parallel == "fsdp"):
            raise ValueError(
                "model.frozen_dtype: float8 stores a LoRA's base, which fsdp cannot shard and task.lora=null trains; "
                "set bfloat16"
            )
        if self.preference_beta and (None in (self.lora, self.latent_cache) or self.noise.convert):
            raise ValueError(
                "task.preference_beta: compares a LoRA with its base on cached latents, at what the base predicts; set "
                "task.lora, task.latent_cache and task.noise.convert=false, or preference_beta=null"
            )
        if self.text_cache is not None and self.trains_text:
            raise ValueError("task.text_cache: the cache needs frozen encoders, but they are trained; set it to null")
        for number, concept in enumerate(config.data.concepts or ()):
            key = f"data.concepts.{number}"
            if concept.mask and self.mask is None:
                raise ValueError(f"{key}.mask: true, but task.mask is null; set task.mask to their source")
            self.captions.changed(f"{key}.captions", concept.captions)
