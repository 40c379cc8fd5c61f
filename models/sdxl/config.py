"""The shape of `model` in finetune_sdxl.py. Values are in conf/model/sdxl*.yaml."""

from typing import Literal

from pydantic import Field

from utils.config.schema import PathText, Strict


class SDXLConfig(Strict):
    """Where SDXL's networks are: a folder of diffusers or a single .safetensors file; null draws tiny ones.

    frozen_dtype: of the networks that are not trained. in_channels: of the images.
    """

    family: Literal["sdxl"]
    name: str = Field(min_length=1)
    path: PathText | None
    frozen_dtype: Literal["float32", "bfloat16"]
    in_channels: Literal[3]
