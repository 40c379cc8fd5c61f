"""The shape of task=diffusion. Values are in conf/task/diffusion.yaml."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data.buckets import BucketConfig
from data.captions import CaptionConfig
from data.tag_weights import TagWeightsConfig
from engine.config import TrainingConfig
from engine.tasks.kind import TaskConfig
from models.sdxl.lora import LoRAConfig
from models.sdxl.sampling import SamplesConfig
from models.sdxl.step import PredictionType, TimestepSampling, Weighting
from utils.config.bounds import BatchSize, Count, Factor, Fraction, Positive
from utils.config.schema import PathText, Strict


class NoiseConfig(Strict):
    """What is predicted, and at which noise.

    convert: accepts a base model of another prediction type or noise table, which training then changes.
    shift_by_resolution: more noise for larger images, so that an area of 1024 x 1024 px has SDXL's table.
    offset: strength of a random brightness in the noise; 0 is off.
    """

    prediction_type: PredictionType
    zero_terminal_snr: bool
    convert: bool
    shift_by_resolution: bool
    offset: Fraction

    @model_validator(mode="after")
    def _has_a_target_everywhere(self) -> Self:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "task.noise.prediction_type: epsilon has nothing to predict where task.noise.zero_terminal_snr=true "
                "makes the last timestep pure noise; set v_prediction, or zero_terminal_snr=false"
            )
        return self


class LossConfig(Strict):
    """Weights of the loss by noise level: `loss_weight` of models/sdxl/step.py has their meaning."""

    weighting: Weighting
    gamma: Positive
    floor: Factor


class TimestepsConfig(Strict):
    """How timesteps are drawn; mean and std are of logit_normal."""

    sampling: TimestepSampling
    mean: Annotated[float, Field(ge=-10, le=10)]
    std: Positive


class DiffusionTaskConfig(TaskConfig):
    """SDXL on captioned images.

    chunk: samples of one bucket that follow each other; a micro-batch is a part of it. caption_chunks: of 75 words,
    which captions have at most. tag_weights: null weighs all images alike. lora: null trains the whole U-Net.
    train_text_encoders: the whole encoders, beside the whole U-Net. average_on: where the average of loop.ema_decay is.
    latent_cache, text_cache: folders; null encodes at every step. text_variants: of a caption in the cache.
    """

    name: Literal["diffusion"]
    noise: NoiseConfig
    loss: LossConfig
    timesteps: TimestepsConfig
    buckets: BucketConfig
    chunk: BatchSize
    captions: CaptionConfig
    caption_chunks: Annotated[int, Field(ge=1, le=8)]
    tag_weights: TagWeightsConfig | None
    lora: LoRAConfig | None
    train_text_encoders: bool
    average_on: Literal["device", "cpu"]
    latent_cache: PathText | None
    text_cache: PathText | None
    text_variants: Count
    samples: SamplesConfig

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders change in training."""
        return self.train_text_encoders or (self.lora is not None and self.lora.text_encoders)

    @property
    def reestimates(self) -> bool:
        """Whether training weighs tags anew."""
        return self.tag_weights is not None and self.tag_weights.reestimate_steps is not None

    def check_run(self, config: TrainingConfig) -> None:
        """Raise ValueError where two settings exclude each other."""
        if config.loop.sampling != "shuffled":
            raise ValueError(
                f"loop.sampling: {config.loop.sampling} is not for task=diffusion, which takes images by bucket; set "
                "loop.sampling=shuffled (task.tag_weights lets rare tags count more)"
            )
        if self.latent_cache is not None and config.data.cache.disk_gib > 0:
            raise ValueError(
                f"data.cache.disk_gib: {config.data.cache.disk_gib:g}, and images are decoded once, because "
                "task.latent_cache keeps what is made of them; set data.cache.disk_gib=0, or task.latent_cache=null"
            )
        if self.lora is not None and self.train_text_encoders:
            raise ValueError(
                "task.train_text_encoders: true trains the whole encoders, and task.lora is set; set "
                "task.lora.text_encoders=true for a LoRA of them, or task.lora=null"
            )
        if self.text_cache is not None and self.trains_text:
            raise ValueError(
                "task.text_cache: holds the texts of frozen encoders, and the encoders are trained; set it to null"
            )
        if self.text_cache is not None and self.captions.varies_tags and self.text_variants == 1:
            raise ValueError(
                "task.text_cache: holds one text of a caption, and task.captions shuffles or drops tags; set "
                "task.text_variants=8, say, or task.text_cache=null"
            )
