"""Layer-wise learning-rate decay: the scale of each parameter's learning rate.

A parameter of layer k has the scale decay ** (last + 1 - k). The network numbers its layers: `layer_of(name, kind)` and
`last_layer(kind)` (models/convnextv2.py), or timm's `group_matcher`.

Source: facebookresearch/ConvNeXt-V2:optim_factory.py (`single`, `group`); huggingface/pytorch-image-models
timm/optim/_param_groups.py (`timm`).
"""

from torch import nn

from utils.errors import UserError


def layer_scales(network: nn.Module, kind: str, decay: float) -> dict[str, float]:
    """Return the scale of the learning rate of each of a network's parameters, by name.

    Raises UserError (`optim.layer_decay`) where the network does not number its layers, or not in this kind.
    """
    names = [name for name, _ in network.named_parameters()]
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    if hasattr(network, "layer_of"):
        head = network.last_layer(kind) + 1
        return {name: decay ** (head - network.layer_of(name, kind)) for name in names}
    if not hasattr(network, "group_matcher"):
        raise UserError(
            f"optim.layer_decay: {decay:g} needs a network that numbers its layers, and {type(network).__name__} does "
            "not; set optim.layer_decay=1.0, or choose a ConvNeXt V2 or a network of timm"
        )
    if kind != "timm":
        raise UserError(
            f"optim.layer_decay_kind: {kind} numbers the layers of ConvNeXt V2, and {type(network).__name__} is a "
            "network of timm; set optim.layer_decay_kind=timm"
        )
    from timm.models import group_parameters

    # As timm.optim.param_groups_layer_decay computes them.
    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}
