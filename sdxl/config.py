"""The schemas of finetune_sdxl.py and finetune_vae.py, and of pictures (predict.py): SDXL, its LoRAs and its VAE.

They import no torch, so that a wrong key is refused at once.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from numpy import ndarray
from pydantic import ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from data.config import DataConfig, WholeData
from data.tags.captions import CaptionConfig
from data.tags.tag_weights import TagWeightsConfig
from engine.config import TrainingConfig
from engine.tasks.config import TaskConfig, TaskTrainingConfig
from sdxl.lora.config import LoRAConfig, PreserveConfig
from utils.config.bounds import (
    Count,
    CountOrZero,
    Factor,
    Fraction,
    Name,
    Pixels,
    Positive,
    Seed,
    Share,
    Side,
    Some,
    Two,
    between,
)
from utils.config.schema import PathText, Strict, text_or
from utils.io.files import Json

CHANNELS = 4  # of latents
STRIDE_PX = 8  # pixels of a latent's side
TIMESTEP_COUNT = 1000
LEAST_CROP_PX = 24  # that the discriminator takes
UNIT_PX = 32  # of a bucket's side: the VAE reduces by 8, the U-Net by another 4

PredictionType = Literal["epsilon", "v_prediction", "flow"]  # rows of family.PREDICTIONS
TimestepSampling = Literal["uniform", "logit_normal", "stratified"]
Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased", "as_noise"]

Sampler = Literal["ddim", "euler", "euler_a", "dpmpp_2m"]

_Number = between(float, -1e6, 1e6)
_Channels = Annotated[list[_Number], Field(min_length=CHANNELS, max_length=CHANNELS)]
_Deviations = Annotated[list[Positive], Field(min_length=CHANNELS, max_length=CHANNELS)]


class VAEValues(TypedDict, total=False):
    """How outputs become latents, and the padding of convolutions. An absent value is as the VAE states it."""

    __pydantic_config__ = ConfigDict(**Strict.model_config)

    scaling_factor: Positive
    latents_mean: _Channels
    latents_std: _Deviations
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]


class SDXLConfig(Strict):
    """SDXL's networks. `path` is a diffusers folder or a single .safetensors file; null: tiny random networks.

    vae: a file, folder or run with another VAE than the one of `path`.
    """

    family: Literal["sdxl"]
    name: Name
    path: PathText | None
    vae: PathText | None
    vae_values: VAEValues
    frozen_dtype: Literal["float32", "bfloat16", "int8"]  # of the networks that are not trained
    in_channels: Literal[3]  # of the images


_UnitSide = Annotated[Side, Field(multiple_of=UNIT_PX)]
_Sizes = Some[Two[_UnitSide]]


class BucketConfig(Strict):
    """The sizes, and what happens to images that fit none of them well.

    The default sizes are, for each of `areas_px`, a square of about this area, and for every side from `min_px` to
    `max_px` in steps of `step_px` the longest other side with at most this area; the two limits are those of the
    largest area, and in proportion of another one. sizes_hw replaces them: a list of sizes for each area.
    fit: the number of sizes of each area; they crop the training images little, and the run states them in sizes_hw.
    assign: the area of an image, if there are several: the largest that does not enlarge it, or else the smallest
    (no_upscale); the one that changes its size least (nearest); or a bucket of each (all). crop: the crop position.
    small: an image that would be enlarged more than `max_upscale` times is enlarged anyway (keep), skipped (drop), or
    trained at its own size, rounded down to `step_px` (native). An image that would lose more than `max_crop` of its
    area is skipped. flip: probability of a horizontal flip.
    Source: NovelAI/novelai-aspect-ratio-bucketing; kohya-ss/sd-scripts:library/model_util.py.
    """

    areas_px: Some[Pixels]
    step_px: _UnitSide
    min_px: _UnitSide
    max_px: _UnitSide
    sizes_hw: Some[_Sizes] | None
    fit: Count | None
    assign: Literal["no_upscale", "nearest", "all"]
    crop: Literal["centre", "random"]
    small: Literal["keep", "drop", "native"]
    max_upscale: between(float, 1, 1000)
    max_crop: Share
    flip: Fraction

    def sizes(self) -> list[ndarray]:
        """Return the sizes of each area, int64 [K, 2]; the smallest area comes first."""
        if self.sizes_hw is not None:
            return [np.array(sizes, dtype=np.int64) for sizes in self.sizes_hw]
        return [sdxl_sizes(area, self.step_px, *self._limits_px(area)) for area in sorted(set(self.areas_px))]

    def of_areas(self, areas_px: list[int]) -> "BucketConfig":
        """Return the buckets of other areas, with sides in proportion."""
        least, most = self._limits_px(max(areas_px))
        return self.changed({"areas_px": areas_px, "min_px": least, "max_px": most})

    def _limits_px(self, area: int) -> tuple[int, int]:
        """Return the least and the most pixels of a side for an area."""
        scale = math.sqrt(area / max(self.areas_px)) / UNIT_PX
        return max(1, round(self.min_px * scale)) * UNIT_PX, max(1, round(self.max_px * scale)) * UNIT_PX

    @model_validator(mode="after")
    def _has_squares(self) -> "BucketConfig":
        least = self.min_px**2
        most = self.max_px**2
        if not least <= max(self.areas_px) <= most or min(self.areas_px) < self.step_px**2:
            raise ValueError(
                f"task.buckets.areas_px: the largest of {self.areas_px} must be between min_px x min_px and "
                f"max_px x max_px, {least} and {most}, and all at least step_px x step_px, {self.step_px**2}; set one"
            )
        return self


def sdxl_sizes(area_px: int, step_px: int, min_px: int, max_px: int) -> ndarray:
    """Return the default sizes of an area (see `BucketConfig`), int64 [K, 2], sorted."""
    square = math.isqrt(area_px) // step_px * step_px
    sizes = {(square, square)}
    for side in range(min_px, max_px + 1, step_px):
        other = min(area_px // side // step_px * step_px, max_px)
        if other >= min_px:
            sizes |= {(side, other), (other, side)}
    return np.array(sorted(sizes), dtype=np.int64)


class MaskConfig(Strict):
    """Where masks are, and how they count.

    source: `alpha`, the image's own channel; `beside`, for `x.jpg` the file `x.mask.png` or `x-masklabel.png`, or one
    with another ending of images; or a folder with `a/x.png` (or another ending) for `a/x.jpg` of `data.root`.
    The loss counts where a mask is white or opaque, and by `floor` where it is darker. An image without a mask counts
    as a whole.
    normalise: divide an image's loss by the mean of its mask, so that small masks count as much as large ones.
    """

    source: Literal["alpha", "beside"] | PathText
    floor: Fraction
    normalise: bool


_Size = Two[Annotated[Side, Field(multiple_of=STRIDE_PX)]]
_Steps = between(int, 1, TIMESTEP_COUNT)


class Prompt(Strict):
    """A picture's text and settings; None: the setting of all prompts.

    negative: "" is the empty prompt, as in training. guidance_rescale: Lin et al. 2023, section 3.4.
    """

    text: str
    negative: str = ""
    image_size_hw: _Size | None = None
    steps: _Steps | None = None
    guidance: Factor | None = None
    guidance_rescale: Fraction = 0.7  # as published
    seed: Seed | None = None

    @property
    def words(self) -> str:
        """The text and the negative."""
        return f"{self.text}\n{self.negative}"


PromptText = text_or(Prompt)


class PictureConfig(Strict):
    """Settings of pictures. sampler: auto is DDIM, and Euler's method for flow."""

    sampler: Literal["auto"] | Sampler
    image_size_hw: _Size
    steps: _Steps
    guidance: Factor

    def complete(self, prompt: str | Prompt, seed: int) -> Prompt:
        """Return a prompt with all settings. seed: for a prompt without a seed."""
        own = {"text": prompt} if isinstance(prompt, str) else prompt.model_dump(exclude_unset=True, exclude_none=True)
        return Prompt.model_construct(**{**self.model_dump(include=Prompt.model_fields.keys()), "seed": seed, **own})


class SamplesConfig(PictureConfig):
    """Pictures of an evaluation, one for each prompt, with fixed noise: the N-th prompt has the seed N, or its own."""

    prompts: text_or(list[PromptText])  # or a file of them (sdxl/pictures/prompts.py)

    def complete_all(self) -> list[Prompt]:
        """Return the prompts with all settings."""
        return [self.complete(prompt, number) for number, prompt in enumerate(self.prompts)]


class DrawConfig(PictureConfig):
    """Settings of prompts that state none. seeds: a prompt without a seed is drawn with each of them.

    emphasis: whether brackets are emphasis; None: as the weights were trained, and text for a base model.
    """

    negative: str
    emphasis: bool | None
    seeds: Some[Seed]

    def complete_all(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """Return a complete prompt for each picture."""
        complete = []
        for prompt in prompts:
            own = None if isinstance(prompt, str) else prompt.seed
            complete += [self.complete(prompt, seed) for seed in (self.seeds if own is None else [own])]
        return complete


class NoiseConfig(Strict):
    """The prediction type and the noise schedule.

    auto: as the base model; to convert a base model, or without one, v_prediction with zero terminal SNR.
    convert: accept a base model with another prediction type or noise schedule, and train it towards this one.
    offset: strength of a random brightness in the noise; perturbation: of noise that the target has not
    (arXiv 2301.11706); multires: levels and discount of `add_coarse_noise` in sdxl/step.py; 0 is off.
    """

    prediction_type: Literal["auto"] | PredictionType
    zero_terminal_snr: Literal["auto"] | bool
    convert: bool
    offset: Fraction
    perturbation: Fraction
    multires_iterations: between(int, 0, 16)
    multires_discount: Fraction

    @model_validator(mode="after")
    def _has_a_target_everywhere(self) -> Self:
        if self.zero_terminal_snr is True and self.prediction_type not in ("auto", "v_prediction"):
            raise ValueError(
                f"task.noise.zero_terminal_snr: true is for v_prediction, not {self.prediction_type}: in pure noise, "
                "epsilon has nothing to predict, and flow always ends in it; set "
                "task.noise.zero_terminal_snr=false, or task.noise.prediction_type=v_prediction"
            )
        return self


class LossConfig(Strict):
    """The error, and weights by noise level: see `measure_errors` and `loss_weight` in sdxl/step.py."""

    kind: Literal["l2", "l1", "huber", "smooth_l1"]
    huber_schedule: Literal["exponential", "snr", "constant"]
    huber_c: Share
    huber_scale: Positive
    weighting: Weighting
    gamma: Positive
    floor: Factor


class TimestepsConfig(Strict):
    """How to draw timesteps, from the first to below the second of `range`. shift: see `shift_times` in step.py."""

    sampling: TimestepSampling
    shift: between(float, 0.01, 100)
    range: Two[CountOrZero]

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if not self.range[0] < self.range[1] <= TIMESTEP_COUNT:
            raise ValueError(f"task.timesteps.range: {self.range}, but [0, 500] means the timesteps 0 to 499 of 1000")
        return self


class DiffusionTaskConfig(TaskConfig):
    """SDXL on captioned images."""

    name: Literal["diffusion"]
    noise: NoiseConfig
    loss: LossConfig
    timesteps: TimestepsConfig
    buckets: BucketConfig
    chunk: Count  # consecutive samples of one bucket; a micro-batch is a part of a chunk
    captions: CaptionConfig
    caption_chunks: between(int, 1, 32)  # of 75 tokens; a longer caption is cut
    preserve: PreserveConfig | None  # null: the base's predictions are not held
    mask: MaskConfig | None  # null: the loss counts everywhere
    tag_weights: TagWeightsConfig | None  # null: all images have the same weight
    lora: LoRAConfig | None  # null: train the whole U-Net
    train_text_encoders: bool  # the whole encoders, together with the whole U-Net
    latent_cache: PathText | None  # a folder; null: encode images at every step
    text_cache: PathText | None  # a folder; null: encode captions at every step
    text_variants: Count  # per caption in the text cache
    samples: SamplesConfig

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders change in training."""
        targets = [] if self.lora is None else self.lora.targets
        return self.train_text_encoders or any(pattern.startswith("text_encoder") for pattern in targets)

    @property
    def class_words(self) -> list[str] | None:
        """The prompts for which the base's predictions are held."""
        prompt = self.preserve and self.preserve.prompt
        return [prompt] if isinstance(prompt, str) else prompt

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
        if config.model.frozen_dtype == "int8" and self.lora is None:
            raise ValueError("model.frozen_dtype: int8 is for a LoRA's base, but task.lora is null; set bfloat16")
        if self.text_cache is not None and self.trains_text:
            raise ValueError("task.text_cache: the cache needs frozen encoders, but they are trained; set it to null")
        if self.preserve and not (self.lora and (self.class_words or self.mask)):
            raise ValueError(
                "task.preserve: holds a LoRA to its base, for the words of prompt, or outside of masks if it is null; "
                "set task.lora, and prompt: photo of a dog or task.mask; or task.preserve=null"
            )
        for number, concept in enumerate(config.data.concepts or ()):
            key = f"data.concepts.{number}"
            if concept.mask and self.mask is None:
                raise ValueError(f"{key}.mask: true, but task.mask is null; set task.mask to their source")
            self.captions.for_concept(f"{key}.captions", concept.captions)


class PerceptualConfig(Strict):
    """The weight of the perceptual distance, and what measures it.

    network: a name of timm; null: `pyramid_distance`. path: its weight file; null: timm's. lpips: a file with LPIPS'
    linear weights for it; null: all channels count alike.
    """

    weight: Factor
    network: Name | None
    path: PathText | None
    lpips: PathText | None

    @model_validator(mode="after")
    def _names_a_network(self) -> Self:
        if self.network is None and (self.path or self.lpips):
            raise ValueError("task.perceptual.network: must be given with path or lpips, such as vgg16.tv_in1k")
        return self


class DiscriminatorConfig(Strict):
    """A discriminator of patches.

    weight: its gradient relative to the other losses; 0 turns it off. start_step: the first step that uses it.
    """

    weight: Factor
    start_step: CountOrZero | None


class AutoencoderTaskConfig(TaskConfig):
    """The VAE's decoder. crop_px: of training."""

    name: Literal["autoencoder"]
    perceptual: PerceptualConfig
    discriminator: DiscriminatorConfig
    crop_px: Annotated[Side, Field(multiple_of=STRIDE_PX, ge=LEAST_CROP_PX)]
    chunk: Count  # consecutive samples of one bucket; a micro-batch is a part of a chunk
    buckets: BucketConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.discriminator.weight and self.discriminator.start_step is None:
            raise ValueError(
                "task.discriminator.start_step: must be given with a weight; set the step at which the decoder is "
                "good without it, such as 2000, or task.discriminator.weight=0.0"
            )
        return self

    def check_run(self, config: TrainingConfig) -> None:
        """Raise ValueError if two settings exclude each other."""
        if config.loop.sampling != "shuffled":
            raise ValueError(f"loop.sampling: {config.loop.sampling} is not for task=autoencoder; set shuffled")
        if config.init_from is not None:
            raise ValueError("init_from: the VAE begins as model.path has it; set init_from=null")


class SDXLTrainingConfig(TaskTrainingConfig):
    """The schema of finetune_sdxl.py."""

    model: SDXLConfig
    data: DataConfig


class VAETrainingConfig(TaskTrainingConfig):
    """The schema of finetune_vae.py."""

    model: SDXLConfig
    data: WholeData
