"""From the `model` group of the configuration to a network."""

import difflib

import timm
from torch import nn

from models.config import ConvNeXtV2Config, ModelConfig, TimmConfig
from models.convnextv2 import ConvNeXtV2
from utils.errors import UserError


def build_network(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the network with fresh weights; `num_classes` 0 makes no head.

    Raises UserError naming `model.name` or `model.drop_path_rate` where timm refuses them.
    """
    match config:
        case ConvNeXtV2Config():
            return ConvNeXtV2(
                in_channels=config.in_channels,
                depths=config.depths,
                dims=config.dims,
                stem_stride=config.stem_stride,
                drop_path_rate=config.drop_path_rate,
                head_init_scale=config.head_init_scale,
                num_classes=num_classes,
            )
        case TimmConfig():
            return _build_timm(config, num_classes)


def check_image_size(config: ModelConfig, image_size_hw: tuple[int, int]) -> None:
    """Raise ValueError (`augment.image_size_hw`) unless both sides are multiples of a ConvNeXt V2's total stride."""
    if not isinstance(config, ConvNeXtV2Config):
        return
    stride = config.total_stride
    if all(side >= stride and side % stride == 0 for side in image_size_hw):
        return
    nearest = [max(stride, round(side / stride) * stride) for side in image_size_hw]
    raise UserError(
        f"augment.image_size_hw: {list(image_size_hw)} is not a multiple of the total stride {stride} of "
        f"{config.name} on both sides; set {nearest}, or choose a model of smaller stride"
    )


def _build_timm(config: TimmConfig, num_classes: int) -> nn.Module:
    """Build a timm network without weights, hence without network access; raise as `build_network` says."""
    # Names such as hf-hub:... are no registered names either: timm would look them up on the internet.
    if not timm.is_model(config.name):
        known = timm.list_models()
        close = difflib.get_close_matches(config.name, known, n=3, cutoff=0.4)
        hint = f"close names: {', '.join(close)}" if close else f"timm {timm.__version__} knows {len(known)} names"
        raise UserError(f"model.name: unknown timm model {config.name!r}; {hint}")
    extra = {} if config.drop_path_rate is None else {"drop_path_rate": config.drop_path_rate}
    try:
        return timm.create_model(
            config.name, pretrained=False, num_classes=num_classes, in_chans=config.in_channels, **extra
        )
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        bare = config.name.split(".")[0]
        raise UserError(f"model.name: {config.name!r} names weights that timm does not have; set {bare}") from error
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(
            f"model.drop_path_rate: {config.drop_path_rate} given, but timm's {config.name} has no stochastic depth; "
            "set null"
        ) from error
