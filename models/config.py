"""The schema of the `model` group: one pydantic model per `family`.

The values are in conf/model/*.yaml, not in defaults here.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from utils.config.bounds import BelowOne, Count, Factor, Name, SizeHW, Width
from utils.config.schema import Strict


class ConvNeXtV2Config(Strict):
    """Describe a ConvNeXt V2: one entry of `depths` (blocks) and one of `dims` (channels) for each stage."""

    family: Literal["convnextv2"]
    name: Name
    in_channels: Width
    # Bounded, because they may also come from a stranger's weight file.
    depths: list[Count] = Field(min_length=2, max_length=5)
    dims: list[Width] = Field(min_length=2, max_length=5)
    stem_stride: Literal[2, 4]
    drop_path_rate: BelowOne
    head_init_scale: Factor

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.depths) != len(self.dims):
            raise ValueError(
                f"model.dims: {len(self.dims)} widths {self.dims} for {len(self.depths)} stages "
                f"(model.depths={self.depths}); set one width for each stage"
            )
        return self

    @property
    def total_stride(self) -> int:
        """Return the pixels per side of a site in the last feature map."""
        return self.stem_stride * 2 ** (len(self.dims) - 1)


Pretrained = Literal["auto", "cached", "never"]
# A stranger's file may state them: none names a file or loads weights.
Argument = Literal[
    "act_layer", "attn_drop_rate", "class_token", "drop_path_rate", "drop_rate", "fc_norm", "global_pool", "img_size",
    "init_values", "no_embed_class", "proj_drop_rate", "qkv_bias", "ref_feat_shape", "reg_tokens", "window_size"
]  # fmt: skip


class TimmConfig(Strict):
    """Describe a network by its timm name; `drop_path_rate: null` keeps the network's default.

    image_size_hw: for networks that need one image size, such as ViTs; null: the default of the name. Weights for
    another size are interpolated when they are loaded. channels: of the four stages of a ResNet; null: the name's.
    arguments: further ones of the network, of `model_args` in timm's config.json. pretrained: whose weights a plan may
    begin from (models/weights/offers.py).
    """

    family: Literal["timm"]
    name: Name
    in_channels: Width
    drop_path_rate: BelowOne | None
    image_size_hw: SizeHW | None
    channels: Annotated[list[Width], Field(min_length=4, max_length=4)] | None
    arguments: dict[Argument, JsonValue]
    pretrained: Pretrained


ModelConfig = Annotated[ConvNeXtV2Config | TimmConfig, Field(discriminator="family")]


def timm_config(name: str, channels: list[int] | None = None) -> TimmConfig:
    """Describe a network of timm for RGB images by its name. channels: of the four stages of a ResNet."""
    values = {"in_channels": 3, "drop_path_rate": None, "image_size_hw": None, "arguments": {}, "pretrained": "auto"}
    return TimmConfig(family="timm", name=name, channels=channels, **values)
