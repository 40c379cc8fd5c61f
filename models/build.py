"""Build a network from the `model` group of the configuration."""

import inspect

import torch
from torch import nn

from models.config import ConvNeXtV2Config, ModelConfig, TimmConfig
from models.small_maps import use_small_maps
from utils.errors import UserError, close_names, reason_of
from utils.io.files import Json

# The arguments with which networks of timm that need one image size take others.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}


def build_network(config: ModelConfig, num_classes: int, *, any_size: bool = False) -> nn.Module:
    """Build the network with random weights; `num_classes` 0 makes no head.

    any_size: let a network of one image size take others: a ViT resamples its position embeddings. The weights are
    the same.
    Raises UserError (`model.name`, or the key of an argument that the network does not have) if timm cannot build it.
    """
    if isinstance(config, TimmConfig):
        return _build_timm(config, num_classes, any_size=any_size)
    from models.convnextv2 import ConvNeXtV2

    return ConvNeXtV2(**config.model_dump(exclude={"family", "name"}), num_classes=num_classes)


def check_image_size(config: ModelConfig, image_size_hw: tuple[int, int], *, any_size: bool = False) -> None:
    """Raise UserError (`augment.image_size_hw`) if the network does not take images of this size.

    The total stride of a ConvNeXt V2 must divide both sides. A timm network is tried on the meta device, which needs
    neither memory nor computation.
    """
    if isinstance(config, ConvNeXtV2Config):
        stride = config.total_stride
        if not all(side >= stride and side % stride == 0 for side in image_size_hw):
            nearest = [max(stride, round(side / stride) * stride) for side in image_size_hw]
            raise UserError(
                f"augment.image_size_hw: {list(image_size_hw)} is not a multiple of the total stride {stride} of "
                f"{config.name} on both sides; set {nearest}, or choose a model with a smaller stride"
            )
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = _build_timm(config, num_classes=1, any_size=any_size).eval()
    except UserError:
        raise
    except Exception:  # it cannot be built on the meta device
        return
    own_hw = getattr(getattr(network, "patch_embed", None), "img_size", None)
    own_hw = tuple(own_hw or network.pretrained_cfg["input_size"][1:])
    refusal = _refusal(network, config.in_channels, tuple(image_size_hw))
    # If its own size is refused too, the network does not run on the meta device.
    if refusal is not None and _refusal(network, config.in_channels, own_hw) is None:
        raise UserError(
            f"augment.image_size_hw: {list(image_size_hw)} is no size for {config.name} ({refusal}); set "
            f"augment.image_size_hw=[{own_hw[0]},{own_hw[1]}], model.image_size_hw of a ViT, or another network"
        )


@torch.no_grad()
def _refusal(network: nn.Module, channels: int, image_size_hw: tuple[int, int]) -> str | None:
    """Return a meta-device network's error for images of a size, or None if it accepts them."""
    try:
        with torch.device("meta"):
            network(torch.zeros(1, channels, *image_size_hw))
    except Exception as error:  # an assertion of timm, or any error for shapes that do not fit
        return reason_of(error).rstrip(".")
    return None


def timm_arguments(config: TimmConfig) -> Json:
    """Return the arguments of timm's network that its name does not imply, but for regularisation."""
    sizes = {} if config.image_size_hw is None else {"img_size": config.image_size_hw}
    if config.channels is not None:
        sizes |= {"channels": config.channels, "stem_width": config.channels[0] // 2}
    return config.arguments | sizes


def _build_timm(config: TimmConfig, num_classes: int, *, any_size: bool = False) -> nn.Module:
    """Build a timm network without weights, and so without network access."""
    import timm  # takes 0.8 s, so only where it is used

    # Names such as hf-hub:... are not registered, and timm would look them up on the internet.
    if not timm.is_model(config.name):
        raise UserError(f"model.name: timm has no {config.name!r}; {close_names(config.name, timm.list_models())}")
    extra = timm_arguments(config)
    if config.drop_path_rate is not None:
        extra["drop_path_rate"] = config.drop_path_rate
    if any_size:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            arguments = inspect.signature(type(_build_timm(config, num_classes))).parameters
        extra |= {name: value for name, value in _ANY_SIZE.items() if name in arguments}
    try:
        network = timm.create_model(
            config.name, pretrained=False, num_classes=num_classes, in_chans=config.in_channels, **extra
        )
    except (RuntimeError, TypeError) as error:  # an unknown tag, or an argument that the network does not have
        keys = {
            "drop_path_rate": "model.drop_path_rate",
            "img_size": "model.image_size_hw",
            "channels": "model.channels",
        }
        key = next((key for name, key in keys.items() if name in str(error)), "model.name")
        raise UserError(f"{key}: timm cannot build {config.name} ({error}); set null, or another name") from error
    use_small_maps(network)
    return network
